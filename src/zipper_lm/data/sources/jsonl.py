"""JSONL files: a row or a whole document a line."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from zipper_lm.data.document import Document, Segment
from zipper_lm.data.sources.table import Loader, Places, Row, Table, missing_file, undecoded
from zipper_lm.utils.json_files import parse_json


def jsonl_loader(file: Path, from_root: bool = False) -> Loader:
    """Reads the file when it is asked to.

    Args:
        file: the list. from_root: see `Places`.
    """
    return lambda limit: read_jsonl(file, limit, Places((file.parent,), from_root))


def json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    """Each line's place, as ``file:line``, and its object. Raises `ValueError` on one that is none."""
    return ((_where(file, line.number), _parsed(file, line)) for line in _lines(file))


class _Line(NamedTuple):
    number: int
    start: int
    content: bytes


def _lines(file: Path) -> Iterator[_Line]:
    """Those that are not blank."""
    start = 0
    with file.open("rb") as stream:
        for number, content in enumerate(stream, 1):
            if content.strip(b" \t\r\n\f\v"):
                yield _Line(number, start, content)
            start += len(content)


def _where(file: Path, number: int) -> str:
    return f"{file}:{number}"


def _parsed(file: Path, line: _Line) -> Row:
    where = f"data: {_where(file, line.number)}"
    try:
        text = line.content.decode("utf-8-sig" if line.start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {file} is not UTF-8 text: {error}") from error
    row = parse_json(text, where)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def read_jsonl(file: Path, limit: int | None, files: Places) -> Table:
    """The first `limit` lines of a file, as rows and documents. All are looked at once; of each, its place is kept."""
    places, problems = array("q"), list[str]()
    stamp = _stamp(file.stat())
    for line in islice(_lines(file), limit):
        places.extend((line.number, line.start, len(line.content)))
        row = _row(file, line, files)
        for number, segment in enumerate(row) if isinstance(row, Document) else ():
            if segment.modality != "text":
                problems += missing_file(segment.value, f"{_where(file, line.number)}: segment {number}")
    rows = JsonlRows(file, np.array(places, np.int64).reshape(-1, 3), stamp, files)
    return Table(rows, rows.where, files=files, problems=problems)


class JsonlRows(Sequence[Any]):  # of `Row | Document`
    """The lines of a file as rows and documents, read when asked for: a million of them take 24 MB.

    Args:
        file: where they are. places: number, first byte and bytes of each line, int64 ``[rows, 3]``.
        stamp: of the file as it was then. files: where those may lie that documents name.
    """

    def __init__(self, file: Path, places: np.ndarray, stamp: tuple[int, int], files: Places) -> None:
        self._file, self._places, self._stamp, self._files = file, places, stamp, files

    def __len__(self) -> int:
        return len(self._places)

    @property
    def where(self) -> Sequence[str]:
        """The place of each, as ``file:line``."""
        return _Places(self._file, self._places[:, 0])

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> JsonlRows: ...

    def __getitem__(self, index: int | slice) -> Any:
        """Raises `ValueError` if the file is gone or has changed."""
        if isinstance(index, slice):
            return JsonlRows(self._file, self._places[index], self._stamp, self._files)
        number, start, size = self._places[index].tolist()
        try:
            with self._file.open("rb", buffering=0) as stream:
                if _stamp(os.fstat(stream.fileno())) != self._stamp:
                    raise ValueError(f"data: {self._file} has changed since it was opened")
                stream.seek(start)
                content = stream.read(size)
        except OSError as error:
            raise ValueError(f"data: {_where(self._file, number)} cannot be read: {error}") from error
        return _row(self._file, _Line(number, start, content), self._files)


class _Places(Sequence[str]):
    def __init__(self, file: Path, numbers: np.ndarray) -> None:
        self._file, self._numbers = file, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        return _where(self._file, int(self._numbers[index]))


def _stamp(file: os.stat_result) -> tuple[int, int]:
    """What differs if a file was written since."""
    return file.st_size, file.st_mtime_ns


def _row(file: Path, line: _Line, files: Places) -> Row | Document:
    row = _parsed(file, line)
    return _read_document(row, files, _where(file, line.number)) if "segments" in row else row


def _read_document(raw: Row, files: Places, where: str) -> Document:
    _check_keys(raw, ("segments",), f"{where}: document")
    if not isinstance(raw["segments"], list) or not raw["segments"]:
        raise ValueError(f"data: {where}: document has no segments")
    document = Document(
        [_read_segment(s, files, f"{where}: segment {number}") for number, s in enumerate(raw["segments"])]
    )
    if not any(segment.target for segment in document):
        raise ValueError(f'data: {where}: document has no target; give a segment "target": true')
    return document


def _read_segment(raw: Any, files: Places, where: str) -> Segment:
    if not isinstance(raw, dict):
        raise ValueError(f"data: {where}: expected a JSON object, got {type(raw).__name__}")
    _check_keys(raw, ("modality", "value", "ids", "target"), where)
    modality, value, ids, target = (raw.get(key) for key in ("modality", "value", "ids", "target"))
    if target not in (None, True, False) or (isinstance(target, int | float) and not isinstance(target, bool)):
        raise ValueError(f"data: {where}: target must be true or false, got {target!r}")
    if ids is not None and not (
        isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)  # True is an int, but no id
    ):
        raise ValueError(f"data: {where}: ids must be a list of whole numbers from 0")
    if modality != "text":
        value = files.resolve(undecoded(value), where)
    try:
        return Segment(modality, value=value, ids=ids, target=bool(target))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"data: {where}: {error}") from error


def _check_keys(raw: Row, known: Sequence[str], where: str) -> None:
    if unknown := sorted(set(raw) - set(known)):
        raise ValueError(f"data: {where}: unknown keys {unknown}; known are {list(known)}")
