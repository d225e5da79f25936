"""Read a picture: anything a user hands over -> `PIL.Image.Image`, or a `ValueError` that says why."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from zipper_lm.codecs.suffixes import IMAGE_SUFFIXES, named
from zipper_lm.utils.places import is_file

MAX_PIXELS = 1 << 25
"""Of one picture: each takes up to 13 bytes, while it is unpacked, turned upright and made plain."""
_BAND = 64
"""Lines that are put on white at once."""


def read_picture(source: Any) -> Image.Image:
    """Read one picture, in its own size and mode.

    Args:
        source: a path (`str` or `Path`), the `bytes` of a picture file, a `PIL.Image.Image`, a dict as in Hugging Face
            datasets (``{"bytes", "path"}``), or an array: uint8 in [0, 255] or floats in [0, 1], ``[height, width]``
            (grey) or ``[height, width, 3]``.

    Raises:
        ValueError: if the file is missing, cut off or no picture; if an array has another shape, dtype or range, or
            holds NaN; if the source is of none of the types above.
    """
    if isinstance(source, Mapping) and "bytes" in source:
        source = source.get("path") if source["bytes"] is None else source["bytes"]
    if isinstance(source, Image.Image):
        _check_size(source)  # one that is read lazily has its size from its file's header
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        return _opened(io.BytesIO(source), f"{len(source)} bytes")
    if isinstance(source, str):
        source = named(source, "picture")
    if isinstance(source, Path):
        if not is_file(source):
            raise ValueError(f"picture: no file {str(source)!r:.200}")
        return _opened(source, str(source))
    raise ValueError(f"picture: cannot read a {type(source).__name__}; give a path, bytes, a PIL image or an array")


def grey(picture: Image.Image) -> Image.Image:
    """A picture in mode ``"L"``: as `rgb`, and colours become their luma (ITU-R 601-2)."""
    return _plain(picture).convert("L")


def rgb(picture: Image.Image, size: tuple[int, int], resample: Image.Resampling | int) -> Image.Image:
    """A picture in mode ``"RGB"`` and of a size (width, height); its sides' ratio is not kept.

    Transparent becomes white, 16 bits become 8, other modes (palette, CMYK, grey, ...) as Pillow converts them.
    """
    picture = _plain(picture).convert("RGB")
    return picture if picture.size == size else picture.resize(size, Image.Resampling(resample))


def is_picture(value: Any) -> bool:
    """Whether a value can only be a picture: an image, an array of two dimensions or more, or a picture file's name."""
    if isinstance(value, Mapping) and "bytes" in value:
        value = value.get("path") if value["bytes"] is None else value["bytes"]
    if isinstance(value, bytes):
        try:
            Image.open(io.BytesIO(value))
        except Image.DecompressionBombError:
            return True  # too large to be read, but nothing else
        except Exception:  # of any kind: what Pillow meets in a damaged file
            return False
        return True
    if isinstance(value, str | Path):
        return Path(value).suffix.lower() in IMAGE_SUFFIXES
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray) and value.ndim >= 2)


def _opened(file: Any, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            _check_size(image)
            image.load()  # a file that is cut off shows it here
            return ImageOps.exif_transpose(image)  # as it was held: a copy, upright
    except Exception as error:  # of any kind: a broken PNG is a SyntaxError to Pillow, an odd DDS not implemented
        raise ValueError(f"picture {name}: not readable ({error})") from error


def _check_size(image: Image.Image) -> None:
    """Raise `ValueError` for more pixels than `MAX_PIXELS`, or fewer where Pillow was told so."""
    limit, pixels = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS), image.width * image.height
    if pixels > limit:
        raise ValueError(f"picture of {image.width} x {image.height} pixels: more than the limit of {limit}")


def _plain(picture: Image.Image) -> Image.Image:
    """A picture without transparency (it becomes white) and of 8 bits."""
    if picture.mode.startswith("I;16") or picture.mode == "I":
        wide = np.asarray(picture)
        narrow = np.empty(wide.shape, np.uint8)
        for row, values in zip(narrow, wide):  # row by row: as numbers of 8 bytes all of it would take much memory
            row[:] = np.clip(np.round(values / 257), 0, 255)
        return Image.fromarray(narrow)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        opaque = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        for top in range(0, opaque.height, _BAND):  # band by band: Pillow makes a third picture of the two
            part = opaque.crop((0, top, opaque.width, min(top + _BAND, opaque.height)))
            white.paste(Image.alpha_composite(Image.new("RGBA", part.size, "white"), part), (0, top))
        return white
    return picture


def _from_array(array: np.ndarray) -> Image.Image:
    grey, colour = array.ndim == 2, array.ndim == 3 and array.shape[-1] == 3
    if not (grey or colour) or 0 in array.shape:
        raise ValueError(f"picture: an array must be [height, width] or [height, width, 3], got {array.shape}")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"picture: an array must be uint8 or of floats, got {array.dtype}")
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValueError("picture: an array of floats must lie in [0, 1]")
        array = np.round(array * 255).astype(np.uint8)
    return Image.fromarray(array)
