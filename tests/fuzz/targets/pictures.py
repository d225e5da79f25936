"""Files of pictures, in every form that Pillow reads by name, and a few that it reads anyway."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random

import numpy as np
from fuzz.octets import blind, mend_png
from fuzz.target import Target
from PIL import Image

from zipper_lm.codecs.picture import grey, is_picture, read_picture, rgb

FORMS = (
    *(
        ("PNG", "L"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "I;16"),
        ("PNG", "1"),
        ("PNG", "LA"),
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
    ),
    *(("GIF", "P"), ("BMP", "RGB"), ("BMP", "P"), ("WEBP", "RGBA"), ("TIFF", "RGB"), ("TIFF", "I;16"), ("ICO", "RGBA")),
    *(
        ("PPM", "RGB"),
        ("TGA", "RGB"),
        ("PCX", "RGB"),
        ("JPEG2000", "RGB"),
        ("DDS", "RGBA"),
        ("SGI", "RGB"),
        ("ICNS", "RGBA"),
    ),
)


def make() -> Target:
    """Of 16 pixels a side."""
    seeds = [_file(form, mode) for form, mode in FORMS]

    def change(data: bytes, draw: Random) -> bytes:
        new = blind(data, draw, seeds)
        return mend_png(new) if draw.random() < 0.8 else new

    return Target(
        name="pictures", run=run, share=220, seeds=seeds, change=change, instrument=("zipper_lm.codecs", "PIL")
    )


def run(data: bytes, folder: Path) -> None:
    """Read, and brought to what codecs take."""
    is_picture(data)
    picture = read_picture(data)
    grey(picture)
    rgb(picture, (8, 8), Image.Resampling.BILINEAR)


def _file(form: str, mode: str) -> bytes:
    draw, out = np.random.default_rng(0), io.BytesIO()
    picture = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8).astype(np.uint8))
    if mode == "I;16":
        picture = Image.fromarray(draw.integers(0, 65_536, (16, 16)).astype(np.uint16))
    else:
        picture = picture.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"exif": exif} if form in ("JPEG", "WEBP", "TIFF") else {}
    picture.save(out, form, **more)
    return out.getvalue()
