"""Sounds and pictures that clients send, from bytes alone: no path is read and no URL is fetched."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from zipper_lm.codecs.audio import read_recording
from zipper_lm.codecs.picture import read_picture
from zipper_lm.serve.errors import Refusal
from zipper_lm.serve.limits import Limits

SOUNDS = ("wav", "flac", "mp3", "ogg (Vorbis or Opus)")
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DATA = "data:"


def read_sound(data: bytes, limits: Limits, param: str) -> tuple[np.ndarray, int]:
    """A sound file's bytes to mono float32 [time], and its sampling rate.

    Args:
        data: the file. param: the field that it came in.

    Raises:
        Refusal: if it is too large, of another format, damaged, too long, or holds more samples than `limits` allow.
    """
    if len(data) > limits.upload:
        raise Refusal(413, f"{param} has {len(data)} bytes, the limit is {limits.upload}", param=param)
    if not data:
        raise Refusal(400, f"{param} is empty", param=param, code="invalid_value")
    if (other := _other_format(data)) is not None:
        raise Refusal(
            400, f"{param} is {other}; it must be one of {', '.join(SOUNDS)}", param=param, code="unsupported_format"
        )
    try:
        return read_recording(data, limits.seconds, limits.samples)
    except ValueError as error:
        raise Refusal(400, f"{param}: {error}", param=param, code="invalid_value") from error


def _other_format(data: bytes) -> str | None:
    """What a file is, if it is none of `SOUNDS`."""
    head = data[:12]
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        return None
    if head[:4] in (b"fLaC", b"OggS") or head[:3] == b"ID3" or (head[0] == 0xFF and head[1:2] >= b"\xe0"):
        return None
    if head[4:8] == b"ftyp":
        return "m4a or mp4"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "webm or matroska"
    return "no sound file that this server knows"


def read_image(text: str, limits: Limits, param: str) -> Image.Image:
    """A data URL to a picture.

    Raises:
        Refusal: for any other URL, another format, a damaged picture, or more pixels than `limits` allow.
    """
    if not text.startswith(_DATA):
        raise Refusal(
            400,
            f"{param} must be a data URL (data:image/png;base64,...): no URL is fetched",
            param=param,
            code="unsupported_url",
        )
    head, comma, body = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise Refusal(400, f"{param}: a data URL must be in base64", param=param, code="invalid_value")
    data = from_base64(body, param)
    if len(data) > limits.upload:
        raise Refusal(413, f"{param} has {len(data)} bytes, the limit is {limits.upload}", param=param)
    try:
        with Image.open(io.BytesIO(data), formats=PICTURES) as picture:
            if (pixels := picture.width * picture.height) > limits.pixels:
                raise Refusal(400, f"{param} has {pixels} pixels, the limit is {limits.pixels}", param=param)
        return read_picture(data)
    except Refusal:
        raise
    except Exception as error:  # of any kind: what Pillow meets in a damaged file
        why = "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)[:200]
        raise Refusal(400, f"{param}: no readable picture ({why})", param=param, code="invalid_value") from error


def from_base64(text: Any, param: str) -> bytes:
    """Raises `Refusal` for what is no base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise Refusal(400, f"{param} must be base64: {error}", param=param, code="invalid_value") from error
