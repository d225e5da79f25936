"""What every kind of data source becomes first: rows, where each is written, and where the files lie that they name."""

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
class Places:
    """Where files may lie that rows name.

    Args:
        folders: here or below; relative names start from the first one. Empty: rows name no files. `None`: rows are
            given in Python, and name what they like.
        from_root: whether names that begin at the root may lead anywhere: in a list that its user names by itself.
    """

    folders: Sequence[Path] | None = None
    from_root: bool = False

    def resolve(self, value: Any, where: str) -> Any:
        """The name of a sound's or picture's file as a path; any other value as it is.

        Raises:
            ValueError: beginning with `where`, if the name leads elsewhere.
        """
        if self.folders is None or not is_media(value) or (self.from_root and Path(value).is_absolute()):
            return value
        problem = ValueError(f"data: {where}: file {value!r:.200}: rows of this source hold their files, and name none")
        for folder in self.folders:
            try:
                return str(inside(folder, value, f"data: {where}: file"))
            except ValueError as error:
                problem = error
        raise problem


ANYWHERE = Places()


def undecoded(value: Any) -> Any:
    """The bytes, else the path, of a dict as in Hugging Face datasets that has no samples; any other value as it is."""
    if isinstance(value, Mapping) and value.get("array") is None:
        return next((value[key] for key in ("bytes", "path") if value.get(key) is not None), value)
    return value


@dataclass(frozen=True)
class Table:
    """Rows before columns are chosen.

    Args:
        rows: dicts and documents; a stream is an iterable without a length.
        where: for messages, where row i is written.
        files: where those may lie that rows name.
        columns: their names, where the source knows them without reading a row; its rows are then not looked at before
            they are used.
        labels: names of the classes that a column of class numbers counts.
        problems: what is wrong with single rows, such as files that do not exist.
        fingerprint: of rows that do not lie in memory, which changes when they do.
    """

    rows: Sequence[Any] | Iterable[Any]
    where: Sequence[str] = ()
    files: Places = ANYWHERE
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


def missing_file(value: Any, where: str) -> list[str]:
    """A message, if a value names a sound or picture file that is not there."""
    return [f"{where}: file {value!r} does not exist"] if is_media(value) and not is_file(value) else []
