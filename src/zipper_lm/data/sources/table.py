"""What every kind of data source becomes first: rows, where each is written, and what relative paths start from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zipper_lm.codecs.suffixes import is_media
from zipper_lm.utils.places import inside, is_file

Row = dict[str, Any]
"""Modality name to raw value, and further columns under their own names."""

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "judge": ("judge",),
}


@dataclass(frozen=True)
class Table:
    """Rows before columns are chosen.

    Args:
        rows: dicts and documents; a stream is an iterable without a length.
        where: for messages, where row i is written.
        folder: what relative paths in the rows start from.
        columns: their names, where the source knows them without reading a row; its rows are then not looked at before
            they are used.
        labels: names of the classes that a column of class numbers counts.
        problems: what is wrong with single rows, such as files that do not exist.
        fingerprint: of rows that do not lie in memory, which changes when they do.
    """

    rows: Sequence[Any] | Iterable[Any]
    where: Sequence[str] = ()
    folder: Path | None = None
    columns: Sequence[str] | None = None
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    problems: Sequence[str] = ()
    fingerprint: str = ""


Loader = Callable[[int | None], Table]
WHOLE = ""  # the name of the only "split" of a source that has none


def usual_name(name: str, otherwise: str) -> str:
    """The usual name of a split: ``"dev"`` is ``"validation"``."""
    return next((usual for usual, names in SPLIT_NAMES.items() if name.lower() in names), otherwise)


def readable(rows: Any) -> Iterator[Any]:
    """The rows that can be read, of a sequence, a `datasets.Dataset` or a stream.

    Raises:
        ValueError: that of the first row, if none can be read.
    """
    if not isinstance(rows, Sized):
        yield from rows
        return
    first, found = None, False
    for number in range(len(rows)):
        try:
            row = rows[number]  # type: ignore[index]
        except ValueError as error:
            first = first or error
        else:
            found = True
            yield row
    if first is not None and not found:
        raise first


def fingerprint_of(parts: Iterable[Any]) -> str:
    """16 hex digits that tell parts from others, by how they are written."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() + b"\n")
    return digest.hexdigest()[:16]


def resolve(value: Any, folder: Path, where: str) -> Any:
    """A file's name as a path from `folder`; any other value as it is.

    Raises:
        ValueError: beginning with `where`, if the name leads out of that folder.
    """
    if not is_media(value) or Path(value).is_absolute():  # a list made on this machine names files wherever they are
        return value
    return str(inside(folder, value, f"data: {where}: file"))


def missing_file(value: Any, where: str) -> list[str]:
    """A message, if a value names a sound or picture file that is not there."""
    return [f"{where}: file {value!r} does not exist"] if is_media(value) and not is_file(value) else []
