"""Clear words where the Hub fails. There is no network in tests: the libraries' own errors are raised."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import errors

from zipper_lm.utils.hub import commit_of, license_of, local_folder, reaching


def _raise(name: str) -> Exception:
    kind = getattr(errors, name)
    error: Exception = kind.__new__(kind)
    error.args = ("raised by the library",)
    return error


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("RepositoryNotFoundError", "no such id on the Hub"),
        ("GatedRepoError", "asks for consent"),
        ("OfflineModeIsEnabled", "offline mode is on"),
        ("LocalEntryNotFoundError", "cannot be reached"),
    ],
)
def test_the_librarys_errors_become_one_clear_line(monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # the tests' own setting
    with pytest.raises(ValueError, match=words) as found, reaching("tower", "owner/name", "v9"):
        raise _raise(name)
    assert "owner/name" in str(found.value)
    assert "\n" not in str(found.value)


def test_what_lies_behind_an_error_counts() -> None:
    """transformers wraps the Hub's errors in an OSError of its own."""
    with pytest.raises(ValueError, match="no revision"), reaching("tower", "owner/name", "v9"):
        raise OSError("something longer\nwith a second line") from _raise("RevisionNotFoundError")


def test_offline_with_nothing_cached(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"owner/name.*cache does not have it"):
        local_folder("owner/name", local_files_only=True, cache_dir=tmp_path)


def test_a_damaged_folder_is_no_problem_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded from that folder: broken"), reaching("tower", tmp_path):
        raise OSError("broken")


def test_a_folder_has_no_commit(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    assert local_folder(tmp_path) == tmp_path


def test_a_licence_is_a_name_or_names(tmp_path):
    """Aliases in a downloaded model card made a licence of 10^8 words out of seven lines."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefg", "bcdefgh")]
    for license, found in (
        ("license: mit", "mit"),
        ("license: [mit, bsd]", "mit, bsd"),
        ("license: {a: 1}", None),
        ("\n".join(lines).replace("h: &h", "license:"), None),
        ("license: other\nlicense_name: [[1]]", "other"),
    ):
        (tmp_path / "README.md").write_text(f"---\n{license}\n---\n")
        assert license_of(tmp_path) == found
