"""What a model generated, as files: sound, picture or text, by what the value is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zipper_lm.codecs.audio import SAMPLING_RATE, write_audio

SUFFIXES = {"sound": (".wav", ".flac"), "picture": (".png",), "text": (".txt",)}


def kind_of(value: Any) -> str:
    """``"sound"`` (an array of one dimension), ``"picture"`` (a PIL image) or ``"text"`` (anything else)."""
    if isinstance(value, Image.Image):
        return "picture"
    return "sound" if isinstance(value, np.ndarray) else "text"


def suffix_of(value: Any) -> str:
    """The usual ending of a file for a value."""
    return SUFFIXES[kind_of(value)][0]


def write_value(file: Path, value: Any) -> None:
    """Write one value to a file that is not there yet; a sound without samples becomes a tenth of a second of silence,
    as a sound file cannot be empty."""
    kind = kind_of(value)
    if kind == "picture":
        value.save(file)
    elif kind == "sound":
        write_audio(file, value if len(value) else np.zeros(SAMPLING_RATE // 10, dtype=np.float32))
    else:
        file.write_text(f"{value}\n", encoding="utf-8")
