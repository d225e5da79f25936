"""WebDataset: tars in which the files of one sample share a name and differ in suffix.

The form is that of https://github.com/webdataset/webdataset: ``0001.flac``, ``0001.txt``, ``0002.flac``, ... A suffix
is a column; the fields of a ``.json`` are columns of their own; ``__key__`` is the common name. The tars are read here
and not through `datasets`, which needs torchcodec to read any that hold sound. Only the headers are read at first: a
sample's bytes when it is asked for, so nothing of the sound lies in memory.
"""

from __future__ import annotations

import re
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

from zipper_lm.data.sources.table import Loader, Places, Row, Table, fingerprint_of, usual_name
from zipper_lm.utils.json_files import parse_json

KEY = "__key__"
_TEXT_SUFFIXES = ("txt", "text", "transcript", "caption", "cls")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BLOCK = tarfile.BLOCKSIZE


def is_tar(source: str | Path) -> bool:
    """Whether a source is a tar, or a pattern of tars."""
    return re.search(r"\.(tar|tgz|tar\.\w+)$", str(source)) is not None


def find_shards(source: str | Path) -> list[Path]:
    """The tars that a path or a pattern names: ``a.tar``, ``shards-*.tar`` or ``shards-{0000..0007}.tar``. A file that
    exists is itself, whatever characters are in its name.

    Raises:
        ValueError: if there is none, one of a range is missing, or they are compressed.
    """
    if not str(source).endswith(".tar"):
        raise ValueError(f"data: {source} is compressed: its samples cannot be read one by one; unpack it to a .tar")
    shards = _named(Path(source).expanduser())
    if missing := [str(s) for s in shards if not s.is_file()]:
        raise ValueError(f"data: no file {missing[0]!r}" + (f" (nor {len(missing) - 1} more)" if missing[1:] else ""))
    if not shards:
        raise ValueError(f"data: no tar matches {str(source)!r}")
    return shards


def _named(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    names = [Path(name) for name in _in_range(str(path))]
    if len(names) == 1 and re.search(r"[*?\[]", names[0].name):
        return sorted(names[0].parent.glob(names[0].name))
    return names


def _in_range(name: str) -> list[str]:
    """``a-{08..10}`` to a-08, a-09, a-10."""
    found = _RANGE.search(name)
    if found is None:
        return [name]
    first, last = found.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    before, after = name[: found.start()], name[found.end() :]
    return [whole for n in numbers for whole in _in_range(before + n + after)]


def tar_splits(shards: Sequence[Path]) -> dict[str, Loader]:
    """Tars by split: the first word of a tar's name says which, else it is for training."""
    parts: dict[str, list[Path]] = {}
    for shard in shards:
        word = re.match(r"[A-Za-z]*", shard.name)
        parts.setdefault(usual_name(word[0] if word else "", "train"), []).append(shard)
    return {name: tar_loader(part) for name, part in parts.items()}


def tar_loader(shards: Sequence[Path]) -> Loader:
    """Reads the headers when it is asked to."""

    def load(limit: int | None) -> Table:
        places = _Places(shards)
        for number, shard in enumerate(shards):
            if limit is None or len(places) < limit:
                for sample in islice(_samples(shard), None if limit is None else limit - len(places)):
                    places.add(number, sample)
        rows = TarRows(places)
        return Table(rows, rows.where, Places(()), columns=rows.columns(), fingerprint=_fingerprint(shards))

    return load


@dataclass(frozen=True, slots=True)
class _Sample:
    shard: Path
    key: str
    files: tuple[tuple[str, int, int], ...]
    """Suffix, first byte, number of bytes."""


class _Places:
    """Samples of tars, packed: as objects, those of a large data set fill the memory."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = shards
        self.suffixes: list[str] = []
        """All that there are; files have their numbers."""
        self._numbers: dict[str, int] = {}
        self._of = array("i")  # number of each sample's shard
        self._ends, self._keys = array("q"), bytearray()  # of each sample's key
        self._last, self._files = array("q"), array("q")  # files up to the end of each sample; suffix, start and size

    def add(self, shard: int, sample: _Sample) -> None:
        self._of.append(shard)
        self._keys += sample.key.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._keys))
        for suffix, start, size in sample.files:
            if (number := self._numbers.setdefault(suffix, len(self.suffixes))) == len(self.suffixes):
                self.suffixes.append(suffix)
            self._files.extend((number, start, size))
        self._last.append(len(self._files) // 3)

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, index: int) -> _Sample:
        first, begin = (self._last[index - 1], self._ends[index - 1]) if index else (0, 0)
        flat = self._files[3 * first : 3 * self._last[index]]
        files = tuple((self.suffixes[n], start, size) for n, start, size in zip(flat[::3], flat[1::3], flat[2::3]))
        key = bytes(self._keys[begin : self._ends[index]]).decode("utf-8", "surrogateescape")
        return _Sample(self._shards[self._of[index]], key, files)


class TarRows(Sequence[Row]):
    """The samples of tars as rows, read when asked for."""

    def __init__(self, samples: _Places, numbers: range | None = None) -> None:
        self._samples = samples
        self._numbers = range(len(samples)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def where(self) -> Sequence[str]:
        """Tar and key of each sample."""
        return _Where(self)

    def where_of(self, index: int) -> str:
        """Tar and key of one."""
        sample = self._samples[self._numbers[index]]
        return f"{sample.shard}:{sample.key}"

    def columns(self) -> list[str]:
        """Suffixes of all samples, and the fields of the first ``.json`` that can be read."""
        if not len(self):
            return []
        suffixes = self._samples.suffixes
        plain = sorted(set(suffixes) - {"json"})
        described = (n for n, at in enumerate(self._numbers) if any(f[0] == "json" for f in self._samples[at].files))
        fields = _first_readable(self, described) if "json" in suffixes else {}
        return list({KEY: None} | dict.fromkeys(plain) | fields)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> TarRows: ...

    def __getitem__(self, index: int | slice) -> Row | TarRows:
        if isinstance(index, slice):
            return TarRows(self._samples, self._numbers[index])
        sample = self._samples[self._numbers[index]]
        row: Row = {}
        with sample.shard.open("rb") as stream:
            for suffix, start, size in sample.files:
                stream.seek(start)
                row |= _columns(suffix, stream.read(size), f"{sample.shard}:{sample.key}.{suffix}")
        return row | {KEY: sample.key}


class _Where(Sequence[str]):
    def __init__(self, rows: TarRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows.where_of(index)


def _first_readable(rows: TarRows, numbers: Iterable[int]) -> Row:
    """The first of some rows that can be read. Raises `ValueError`, that of the first one, if none can."""
    first: ValueError | None = None
    for number in numbers:
        try:
            return rows[number]
        except ValueError as error:
            first = first or error
    if first is not None:
        raise first
    return {}


def _fingerprint(shards: Sequence[Path]) -> str:
    found = [(shard, shard.stat()) for shard in shards]
    return fingerprint_of((str(shard), file.st_size, file.st_mtime_ns) for shard, file in found)


def _columns(suffix: str, content: bytes, where: str) -> Row:
    """What one file adds to its row."""
    try:
        if suffix in _TEXT_SUFFIXES:
            return {suffix: content.decode("utf-8-sig").strip()}
        if suffix == "json":
            fields: Any = parse_json(content, where)
            return fields if isinstance(fields, dict) else {suffix: fields}
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: cannot be read: {error}") from error
    return {suffix: content}


def _samples(shard: Path) -> list[_Sample]:
    """A tar's samples by their headers: files that follow each other with one name up to the first dot.

    Raises:
        ValueError: naming tar and key, if a sample's files lie apart or have one suffix; as `_members`.
    """
    samples: list[_Sample] = []
    done: set[str] = set()
    files: dict[str, tuple[int, int]] = {}
    last = ""
    for name, start, size in _members(shard):
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if not stem or not suffix:
            continue
        key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
        if key != last and files:
            samples.append(_Sample(shard, last, tuple((s, *at) for s, at in files.items())))
            files = {}
            done.add(last)
        if key in done:
            raise ValueError(
                f"data: {shard}: the files of sample {key!r} do not follow each other (.{suffix} comes after another "
                "sample's); write the tar anew with its files sorted by name"
            )
        if suffix in files:
            raise ValueError(f"data: {shard}: sample {key!r} has two files .{suffix}")
        files[suffix], last = (start, size), key
    if files:
        samples.append(_Sample(shard, last, tuple((s, *at) for s, at in files.items())))
    return samples


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of each file.

    Raises:
        ValueError: naming the tar, if it is none, or cut off. `tarfile` stops at a damaged header without a word, so
            the empty block that ends every tar is looked for.
    """
    try:
        with tarfile.open(shard, "r:") as archive:
            length = shard.stat().st_size
            for member in archive:
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"{member.name!r} is not all there")
                archive.members = []  # type: ignore[attr-defined]  # else it holds all that were seen
                if member.isfile():
                    yield member.name, member.offset_data, member.size
            end = archive.offset
        with shard.open("rb") as stream:
            stream.seek(end)
            if stream.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError(f"its end is missing at byte {end}")
    except Exception as error:  # a size that no file has is a ValueError to `tarfile`, a name an error of Unicode
        raise ValueError(f"data: {shard} is no whole tar: {error}") from error
