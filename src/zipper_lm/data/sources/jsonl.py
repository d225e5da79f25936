"""JSONL files: a row or a whole document a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from zipper_lm.data.document import Document, Segment
from zipper_lm.data.sources.table import Loader, Row, Table, missing_file, resolve
from zipper_lm.utils.json_files import parse_json


def jsonl_loader(file: Path) -> Loader:
    """Reads the file when it is asked to."""
    return lambda limit: read_jsonl(file, limit)


def json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    """Each line's place, as ``file:line``, and its object. Raises `ValueError` on one that is none."""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                row = parse_json(line, f"data: {file}:{number}")
                if not isinstance(row, dict):
                    raise ValueError(f"data: {file}:{number}: expected a JSON object, got {type(row).__name__}")
                yield f"{file}:{number}", row
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {file} is not UTF-8 text: {error}") from error


def read_jsonl(file: Path, limit: int | None) -> Table:
    """The first `limit` lines of a file, as rows and documents."""
    wheres: list[str] = []
    rows: list[Row | Document] = []
    problems: list[str] = []
    for where, row in islice(json_lines(file), limit):
        wheres.append(where)
        if "segments" not in row:
            rows.append(row)
            continue
        rows.append(document := _read_document(row, file.parent, where))
        for number, segment in enumerate(document):
            if segment.modality != "text":
                problems += missing_file(segment.value, f"{where}: segment {number}")
    return Table(rows, wheres, folder=file.parent, problems=problems)


def _read_document(raw: Row, folder: Path, where: str) -> Document:
    _check_keys(raw, ("segments",), f"{where}: document")
    if not isinstance(raw["segments"], list) or not raw["segments"]:
        raise ValueError(f"data: {where}: document has no segments")
    document = Document(
        [_read_segment(s, folder, f"{where}: segment {number}") for number, s in enumerate(raw["segments"])]
    )
    if not any(segment.target for segment in document):
        raise ValueError(f'data: {where}: document has no target; give a segment "target": true')
    return document


def _read_segment(raw: Any, folder: Path, where: str) -> Segment:
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
        value = resolve(value, folder)
    try:
        return Segment(modality, value=value, ids=ids, target=bool(target))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"data: {where}: {error}") from error


def _check_keys(raw: Row, known: Sequence[str], where: str) -> None:
    if unknown := sorted(set(raw) - set(known)):
        raise ValueError(f"data: {where}: unknown keys {unknown}; known are {list(known)}")
