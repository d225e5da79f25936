"""WebDataset tars: rows by name and suffix, read in place; damage is named."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from zipper_lm.codecs.audio import read_audio
from zipper_lm.codecs.pixels import PixelCodec, PixelCodecConfig
from zipper_lm.data.sources.readers import list_splits, read_rows, stream_rows


def sound(format: str = "FLAC", rate: int = 16_000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full((rate // 10, channels), 0.25), rate, format=format)
    return file.getvalue()


def tar(path: Path, files: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def spoken(path: Path, *texts: str) -> Path:
    return tar(path, {f"a/{n}.{s}": c for n, t in enumerate(texts) for s, c in (("flac", sound()), ("txt", f"{t}\n"))})


def test_suffixes_are_columns(tmp_path: Path) -> None:
    path = spoken(tmp_path / "x.tar", "one", "two", "six")
    rows = read_rows(path)
    assert len(rows) == 3
    assert rows[1] == {"speech": sound(), "text": "two", "__key__": "a/1"}
    assert rows.column("text") == ["one", "two", "six"]
    assert rows.where(2) == f"{path}:a/2"
    assert [r["text"] for r in pickle.loads(pickle.dumps(rows))[1:]] == ["two", "six"]
    assert len(read_rows(path, limit=2)) == 2
    with pytest.raises(ValueError, match=r"has no column 'words'.*\['__key__', 'flac', 'txt'\]"):
        read_rows(path, {"text": "words"})
    assert len(stream_rows(path)) == 3  # type: ignore[arg-type]


def test_a_byte_order_mark_is_no_letter(tmp_path: Path) -> None:
    """It stayed at the start of a text that an editor had saved with one; tables were read without."""
    rows = read_rows(spoken(tmp_path / "x.tar", "\ufeffone"))
    assert rows[0]["text"] == "one"


def test_fields_of_json_are_columns_and_other_files_are_passed_over(tmp_path: Path) -> None:
    files = {"README": "nothing", "a/._1.wav": b"x", "a/1.wav": sound("WAV"), "a/1.seg.json": "[1]"}
    files["a/1.json"] = json.dumps({"caption": "a tone", "pitch": 3})
    row = read_rows(tar(tmp_path / "x.tar", files))[0]
    assert row == {"speech": sound("WAV"), "text": "a tone", "pitch": 3, "seg.json": b"[1]", "__key__": "a/1"}


def test_pictures_reach_their_codec(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(file, "PNG")
    row = read_rows(tar(tmp_path / "x.tar", {"1.png": file.getvalue(), "1.txt": "half"}))[0]
    assert PixelCodec(PixelCodecConfig(height=1, width=2, levels=2)).encode([row["image"]]) == [[0, 1]]


def test_other_rates_and_stereo(tmp_path: Path) -> None:
    row = read_rows(tar(tmp_path / "x.tar", {"1.ogg": sound("OGG", 44_100, 2), "1.txt": "one"}))[0]
    assert read_audio(row["speech"]).shape == (1600,)


def test_shards_and_splits(tmp_path: Path) -> None:
    for name, text in {"train-00": "a", "train-01": "b", "dev-00": "c", "x-09": "d", "x-10": "e"}.items():
        spoken(tmp_path / "all" / f"{name}.tar", text)
    assert sorted(list_splits(tmp_path / "all")) == ["train", "validation"]
    assert read_rows(tmp_path / "all").column("text") == ["a", "b", "d", "e"]
    assert read_rows(tmp_path / "all", split="validation").column("text") == ["c"]
    assert read_rows(f"{tmp_path}/all/x-{{09..10}}.tar").column("text") == ["d", "e"]
    assert read_rows(f"{tmp_path}/all/train-*.tar").column("text") == ["a", "b"]
    spoken(tmp_path / "by" / "train" / "0.tar", "f")
    spoken(tmp_path / "by" / "test" / "0.tar", "g")
    assert list_splits(tmp_path / "by") == ["test", "train"]
    assert read_rows(tmp_path / "by", split="test").column("text") == ["g"]


@pytest.mark.parametrize("name", ["[clean].tar", "a*.tar", "what?.tar", "{0..1}.tar", "set[1]/x.tar"])
def test_a_file_that_exists_is_itself(tmp_path: Path, name: str) -> None:
    """A tar with a bracket in its name was taken for a pattern, which it does not match itself."""
    spoken(tmp_path / name, "one")
    spoken(tmp_path / "ab.tar", "other")
    assert read_rows(tmp_path / name).column("text") == ["one"]


def test_a_folder_named_like_a_tar_is_a_folder(tmp_path: Path) -> None:
    spoken(tmp_path / "all.tar" / "0.tar", "one")
    assert read_rows(tmp_path / "all.tar").column("text") == ["one"]


def test_files_of_a_sample_that_lie_apart_are_refused_by_name(tmp_path: Path) -> None:
    """Such a tar, as of ``tar -cf x.tar *.flac *.txt``, gave each sample twice, each time with half of its files."""
    path = tar(tmp_path / "x.tar", {"a/1.flac": sound(), "a/2.flac": sound(), "a/1.txt": "one", "a/2.txt": "two"})
    with pytest.raises(ValueError, match=r"data: .*x\.tar: .*'a/1' do not follow each other \(\.txt"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x-{0..2}.tar", r"no file '.*x-1.tar' \(nor 1 more\)"),
        ("y-*.tar", "no tar matches"),
        ("x.tar.gz", "is compressed"),
        ("x.tgz", "is compressed"),
        ("none.tar", r"no file '.*none.tar'"),
    ],
)
def test_tars_that_are_not_there(tmp_path: Path, name: str, message: str) -> None:
    spoken(tmp_path / "x-0.tar", "one")
    with pytest.raises(ValueError, match=f"data: .*{message}"):
        read_rows(tmp_path / name)


def test_a_tar_cut_off_anywhere_is_named(tmp_path: Path) -> None:
    """`tarfile` takes most of these for whole."""
    whole = spoken(tmp_path / "whole.tar", "one", "two").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        ends = [member.offset for member in archive] + [archive.offset]
    for length in sorted({0, 1, 100, 700, *ends[1:], *(end + 300 for end in ends), *(end - 300 for end in ends[1:])}):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"data: .*cut\.tar is no whole tar"):
            read_rows(tmp_path / "cut.tar")


def test_a_broken_sample_that_comes_first_is_one_of_many(tmp_path: Path) -> None:
    """Columns were those of the first sample, so that one damaged ``.json`` ended it all, and a sound in another format
    than the first was in no column. Nor could anything be excluded from a tar with a damaged sample."""
    files = {"1.json": "{", "1.flac": b"", "2.json": '{"who": "ann"}', "2.flac": b"", "2.txt": "a"}
    rows = read_rows(tar(tmp_path / "x.tar", files | {"3.json": '{"who": "bob"}', "3.flac": b"", "3.txt": "b"}))
    assert rows.columns == {"speech": "flac", "text": "txt"}
    assert rows.column("who") == [None, "ann", "bob"]
    kept = rows.without({"who": ["ann"]})
    assert [kept.where(n)[-1] for n in range(len(kept))] == ["1", "3"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no rows"),
        ({"README": "x"}, "no rows"),
        ({"1.txt": "a", "1.TXT": "b"}, r"sample '1' has two files \.txt"),
        ({"1.json": "{"}, r"bad\.tar:1\.json: malformed JSON"),
        ({"1.txt": b"\xff"}, r"bad\.tar:1\.txt: cannot be read"),
    ],
)
def test_bad_tars(tmp_path: Path, files: dict[str, bytes | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rows(tar(tmp_path / "bad.tar", files))


def test_samples_are_packed(tmp_path: Path) -> None:
    """Each was several Python objects, half a kilobyte in all."""
    for shard in range(2):
        tar(
            tmp_path / f"train-{shard}.tar",
            {f"d/ü{shard}{n:04}.{s}": f"{n}" for n in range(300) for s in ("txt", "cls")},
        )
    rows = read_rows(tmp_path / "train-*.tar")
    assert len(rows) == 600
    assert [rows[n]["text"] for n in (0, 299, 300, 599)] == ["0", "299", "0", "299"]
    assert [rows[200:][n]["__key__"] for n in (0, 200)] == ["d/ü00200", "d/ü10100"]
    assert rows.where(599).endswith("train-1.tar:d/ü10299")
    assert len(pickle.dumps(rows)) < 600 * 90 + 2000
    assert len(read_rows(tmp_path / "train-*.tar", limit=301)) == 301
