"""What every kind of data source becomes first: rows, where each is written, and what relative paths start from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""Modality name to raw value, and further columns under their own names."""

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "judge": ("judge",),
}
IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
_SOUND_SUFFIXES = frozenset(
    (".aac", ".aif", ".aiff", ".au", ".caf", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".sph", ".wav", ".wave")
)
_MEDIA_SUFFIXES = IMAGE_SUFFIXES | _SOUND_SUFFIXES


@dataclass(frozen=True)
class Table:
    """Rows before columns are chosen. `where` says for messages where row i is written."""

    rows: Sequence[Any]
    where: Sequence[str] = ()
    folder: Path | None = None
    """What relative paths in the rows start from."""
    is_dataset: bool = False


Loader = Callable[[int | None], Table]
WHOLE = ""  # the name of the only "split" of a source that has none


def usual_name(name: str, otherwise: str) -> str:
    """The usual name of a split: ``"dev"`` is ``"validation"``."""
    return next((usual for usual, names in SPLIT_NAMES.items() if name.lower() in names), otherwise)


def is_media(value: Any) -> bool:
    """Whether a value is the name of a sound or picture file."""
    return isinstance(value, str) and Path(value).suffix.lower() in _MEDIA_SUFFIXES


def resolve(value: Any, folder: Path) -> Any:
    """A file's name as a path from `folder`; any other value as it is."""
    return str(folder / value) if is_media(value) else value


def check_file(value: Any, where: str) -> None:
    """Raise `ValueError` if a value names a sound or picture file that is not there."""
    if is_media(value) and not Path(value).is_file():
        raise ValueError(f"data: {where}: file {value!r} does not exist")
