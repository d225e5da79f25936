"""Which files hold sound or pictures, by the end of their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
_SOUND_SUFFIXES = frozenset(
    (".aac", ".aif", ".aiff", ".au", ".caf", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".sph", ".wav", ".wave")
)
_MEDIA_SUFFIXES = IMAGE_SUFFIXES | _SOUND_SUFFIXES


def is_media(value: Any) -> bool:
    """Whether a value is the name of a sound or picture file."""
    return isinstance(value, str) and Path(value).suffix.lower() in _MEDIA_SUFFIXES


def named(name: str, what: str) -> Path:
    """A text that names a file of sound or picture, as a path.

    Raises:
        ValueError: for one that does not end as such files do. What rows hold is text, too, and no text shall open just
            any file.
    """
    if not is_media(name):
        raise ValueError(
            f"{what}: {name!r:.200} is no name of a sound or picture file, which ends in one of "
            f"{' '.join(sorted(_MEDIA_SUFFIXES))}; a file with another name can be given as a pathlib.Path"
        )
    return Path(name)
