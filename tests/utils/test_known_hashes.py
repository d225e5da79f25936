"""Hashes of files that need not be computed twice."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from zipper_lm.utils import known_hashes
from zipper_lm.utils.known_hashes import FilesSeen

A, B = "a" * 64, "b" * 64


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they are; no file is too new."""
    monkeypatch.setattr(known_hashes, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(known_hashes, "FRESH", 0.0)
    return tmp_path / "cache" / "hashes.json"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"12345")
    return path


def computed(files: list[Path], how: object = "", gives: str = A, expected: str | None = A) -> bool:
    """Whether the hash was computed."""
    calls: list[str] = []
    assert FilesSeen(files).hash(how, expected, lambda: calls.append(gives) or gives) == gives
    return bool(calls)


def test_it_is_computed_once(cache: Path, file: Path) -> None:
    assert computed([file])
    assert not computed([file])
    assert computed([file], how="otherwise")
    assert not computed([file], how="otherwise")
    assert computed([file, file])
    assert json.loads(cache.read_text())["format"] == known_hashes.FORMAT


def test_what_is_remembered_only_confirms(cache: Path, file: Path) -> None:
    """Nobody is refused, and nothing is recorded, because of what was remembered."""
    computed([file])
    assert computed([file], gives=B, expected=B)
    assert computed([file], gives=A, expected=None)


@pytest.mark.parametrize("change", ["content", "times kept", "replaced", "moved", "gone"])
def test_a_file_that_changed_is_read(change: str, cache: Path, file: Path) -> None:
    computed([file])
    told, files = file.stat(), [file]
    if change == "content":
        file.write_bytes(b"123456")
    elif change == "times kept":  # as a copying program can
        time.sleep(0.02)
        file.write_bytes(b"54321")
        os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (told.st_size, told.st_mtime_ns)
    elif change == "replaced":
        (file.parent / "new").write_bytes(b"54321")
        os.utime(file.parent / "new", ns=(told.st_atime_ns, told.st_mtime_ns))
        os.replace(file.parent / "new", file)
    elif change == "moved":
        files = [file.rename(file.parent / "elsewhere")]
    else:
        file.unlink()
    assert computed(files, gives=B)


def test_what_is_too_new_is_not_remembered(
    cache: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be written once more within one tick of the file system's clock."""
    monkeypatch.setattr(known_hashes, "FRESH", 60.0)
    assert computed([file])
    assert computed([file])
    monkeypatch.setattr(known_hashes, "FRESH", 0.0)
    os.utime(file, (time.time() + 100, time.time() + 100))  # of a machine whose clock is ahead
    assert computed([file])
    assert computed([file])
    assert computed([])
    assert computed([tmp_path / "nowhere"])
    assert not cache.exists()


def test_what_changes_while_it_is_read_is_not_remembered(cache: Path, file: Path) -> None:
    seen = FilesSeen([file])
    file.write_bytes(b"other")
    assert seen.hash("", A, lambda: B) == B
    changing = FilesSeen([file])
    assert changing.hash("", A, lambda: file.write_text("12") and A) == A
    assert not cache.exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        "{}",
        '{"format": 1, "hashes": [1]}',
        '{"format": 1, "hashes": {"x": 1}}',
        "\ud800",
        "other format",
    ],
)
def test_a_broken_file_is_passed_over(content: str, cache: Path, file: Path) -> None:
    assert computed([file])
    good = json.loads(cache.read_text())
    text = json.dumps({**good, "format": known_hashes.FORMAT + 1}) if content == "other format" else content
    cache.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert computed([file])
    assert json.loads(cache.read_text()) == good


def test_it_holds_the_last_ones(cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_hashes, "MOST", 3)
    for number in range(5):
        computed([file], how=number)
    assert len(json.loads(cache.read_text())["hashes"]) == 3
    assert [computed([file], how=number) for number in (4, 3, 2, 0)] == [False, False, False, True]


def test_several_write_at_once(cache: Path, file: Path) -> None:
    """None is lost, though each writes the whole file anew."""
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda number: computed([file], how=number), range(24)))
    assert not any(computed([file], how=number) for number in range(24))
    assert {path.name for path in cache.parent.iterdir()} == {"hashes.json", "locks"}


def test_it_is_done_without(cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be written, or another process holds the lock."""
    computed([file], how=0)
    monkeypatch.setattr(known_hashes, "PATIENCE", 0.05)
    with FileLock(cache.parent / "locks" / "hashes.lock"):
        assert computed([file], how=1)
    before = cache.read_bytes()
    monkeypatch.setattr(known_hashes, "cache_folder", lambda: file)  # no folder
    assert computed([file], how=2)
    assert computed([file], how=2)
    assert cache.read_bytes() == before


def test_a_full_disk_leaves_what_was_there(cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed([file], how=0)
    before = cache.read_bytes()

    def full(path: Path, content: object) -> None:
        path.write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(known_hashes, "write_json", full)
    assert computed([file], how=1)
    assert cache.read_bytes() == before
