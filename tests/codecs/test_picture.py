"""Pictures: everything that people hand over is read, or refused by name."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zipper_lm.codecs.picture import is_picture, read_picture

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def as_bytes(picture: Image.Image, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form)
    return stream.getvalue()


def damaged_png() -> bytes:
    """A PNG whose second chunk of pixels has no right to its name."""
    whole = as_bytes(Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400), np.uint8)))
    second = whole.index(b"IDAT", whole.index(b"IDAT") + 4)
    return whole[:second] + b"\x00\x01\x02\x03" + whole[second + 4 :]


def bomb() -> bytes:
    """A PNG of a few bytes that says it is of 60000 by 60000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return whole + struct.pack(">I", 4) + b"IDAT" + bytes(8)


@pytest.mark.parametrize("how", ["array", "floats", "pil", "bytes", "path", "dataset"])
def test_the_same_pixels_from_every_kind_of_source(how: str, tmp_path: Path) -> None:
    picture = Image.fromarray(GREY)
    (tmp_path / "a.png").write_bytes(as_bytes(picture))
    sources: dict[str, Any] = {
        "array": GREY,
        "floats": GREY / 255,
        "pil": picture,
        "bytes": as_bytes(picture),
        "path": tmp_path / "a.png",
        "dataset": {"bytes": as_bytes(picture), "path": None},
    }
    assert is_picture(sources[how])
    assert (np.asarray(read_picture(sources[how])) == GREY).all()


def test_a_photograph_is_upright(tmp_path: Path) -> None:
    """A camera that was turned writes the picture sideways, and says so in EXIF: it was read sideways."""
    picture, said = Image.fromarray(GREY), Image.Exif()
    said[0x0112] = 6  # to be turned to the right
    picture.save(tmp_path / "a.png", exif=said)
    assert (np.asarray(read_picture(tmp_path / "a.png")) == np.rot90(GREY, -1)).all()


def test_colour_stays_colour() -> None:
    colour = np.zeros((2, 2, 3), dtype=np.uint8)
    colour[..., 1] = 200
    assert read_picture(colour).mode == "RGB"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("none.png", "no file 'none.png'"),
        (b"no picture", "10 bytes: not readable"),
        (
            as_bytes(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)))[:300],
            "not readable",
        ),
        (np.zeros((2, 2, 4), np.uint8), r"got \(2, 2, 4\)"),
        (np.zeros((0, 2), np.uint8), r"got \(0, 2\)"),
        (np.zeros((2, 2), np.int64), "got int64"),
        (np.full((2, 2), 1.5), r"must lie in \[0, 1\]"),
        (np.full((2, 2), np.nan), r"must lie in \[0, 1\]"),
        (3, "cannot read a int"),
    ],
)
def test_what_is_no_picture_is_refused(source: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_picture(source)


@pytest.mark.parametrize("value", [np.zeros(5), "a.wav", b"RIFF", {"bytes": b"RIFF", "path": None}, "text", None])
def test_sounds_and_texts_are_no_pictures(value: Any) -> None:
    assert not is_picture(value)


def test_damage_is_named_whatever_pillow_calls_it() -> None:
    """A damaged PNG is a SyntaxError to Pillow, and one of too many pixels an error of its own: both ended a run of
    hours with a traceback, whatever data.broken_limit said."""
    for damaged in (damaged_png(), bomb()):
        assert is_picture(damaged)
        with pytest.raises(ValueError, match="not readable"):
            read_picture(damaged)


def test_a_picture_that_pillow_only_warns_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some kilobytes may hold 168 million pixels: Pillow warns from its limit on, and refuses twice as many only."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90)
    file = io.BytesIO()
    Image.new("L", (10, 10)).save(file, "PNG")
    for source in (file.getvalue(), Image.new("L", (10, 10))):
        with (
            warnings.catch_warnings(action="ignore"),
            pytest.raises(ValueError, match=r"picture of 10 x 10 pixels: more than the limit of 90"),
        ):
            read_picture(source)
