"""How a codec's class is found again."""

import json
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from zipper_lm.codecs import codec
from zipper_lm.codecs.codec import CODEC_FILE, ENTRY_POINTS, can_decode, load_codec


class Letters:
    """Somebody else's codec: only as much as loading needs."""

    kind = "letters"

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Letters":
        assert (Path(path) / CODEC_FILE).is_file()
        return cls()


def test_a_codec_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CODEC_FILE).write_text(json.dumps({"kind": "letters"}))
    with pytest.raises(ValueError, match=r"kind 'letters'; known kinds are .*'speech'.*'text'"):
        load_codec(tmp_path)

    def named(group: str) -> EntryPoints:
        assert group == ENTRY_POINTS
        return EntryPoints([EntryPoint("letters", f"{__name__}:Letters", group)])

    monkeypatch.setattr(codec, "entry_points", named)
    assert type(load_codec(tmp_path)).__name__ == "Letters"


def test_a_codec_that_decodes_no_empty_batch_can_decode_others() -> None:
    """It was tried out with an empty batch: another package's codec that refuses one lost its values in `generate`."""

    class Rows:
        def decode(self, ids: list[list[int]]) -> list[str]:
            longest = max(map(len, ids))
            return ["".join(map(str, row)).ljust(longest) for row in ids]

    with pytest.raises(ValueError, match="empty"):
        Rows().decode([])
    assert can_decode(Rows())  # type: ignore[arg-type]


def test_no_codec(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no codec\.json in"):
        load_codec(tmp_path)
