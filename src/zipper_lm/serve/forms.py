"""Sound as bytes, piece by piece: 24 kHz, mono. Each form can be played from its first piece on.

libsndfile writes MP3, Ogg/Opus and FLAC. It goes back to a header when all is written; what was sent stays as it was,
and says that its length is not known.
"""

from __future__ import annotations

import io
import struct
from typing import Any, Protocol

import numpy as np
import soundfile
import soxr

from zipper_lm.codecs.audio import SAMPLING_RATE

RATE = 24_000
"""Samples per second of every form: what OpenAI's clients take raw samples to be at."""
MEDIA = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
"""Forms, and what they are called in a content-type."""
_OPEN_LENGTH = 0xFFFF_FFFF
_SET_PAGE_LATENCY, _PAGE = 0x1302, 100.0  # SFC_SET_OGG_PAGE_LATENCY_MS
_WRITTEN = {"mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS"), "flac": ("FLAC", "PCM_16")}


class Form(Protocol):
    """Samples at `RATE` to bytes."""

    def add(self, wave: np.ndarray) -> bytes:
        """Of some more samples, float32 [time]."""

    def end(self) -> bytes:
        """What is still to come."""


class Encoder:
    """Sound at 16 kHz to one form.

    Args:
        form: of `MEDIA`.
    """

    def __init__(self, form: str) -> None:
        self.form: Form = _Written(form) if form in _WRITTEN else _Raw(header=form == "wav")
        self.rate = soxr.ResampleStream(SAMPLING_RATE, RATE, 1, dtype="float32", quality="HQ")

    def add(self, wave: np.ndarray) -> bytes:
        """Of some more sound, float32 [time] at 16 kHz in [-1, 1]; what a filter has not seen the end of waits."""
        return self.form.add(self.rate.resample_chunk(np.ascontiguousarray(wave, dtype=np.float32)))

    def end(self) -> bytes:
        """The rest."""
        last = self.rate.resample_chunk(np.zeros(0, dtype=np.float32), last=True)
        return self.form.add(last) + self.form.end()


def encoded(wave: np.ndarray, form: str) -> bytes:
    """A whole sound, float32 [time] at 16 kHz, in one form."""
    encoder = Encoder(form)
    return encoder.add(wave) + encoder.end()


class _Raw:
    """16-bit samples, little-endian, perhaps behind the header of a WAV file that does not know its length."""

    def __init__(self, header: bool) -> None:
        self.begun = not header

    def add(self, wave: np.ndarray) -> bytes:
        header = b""
        if not self.begun:
            self.begun = True
            form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
            header = struct.pack("<4sI4s", b"RIFF", _OPEN_LENGTH, b"WAVE") + form
            header += struct.pack("<4sI", b"data", _OPEN_LENGTH)
        return header + (np.clip(wave, -1.0, 1.0) * 32767).round().astype("<i2").tobytes()

    def end(self) -> bytes:
        return b""


class _Written:
    """What libsndfile writes."""

    def __init__(self, form: str) -> None:
        kind, subtype = _WRITTEN[form]
        self.out = _Forward()
        self.file: Any = soundfile.SoundFile(self.out, "w", RATE, 1, subtype, format=kind)
        if kind == "OGG":
            _turn_pages_often(self.file)

    def add(self, wave: np.ndarray) -> bytes:
        self.file.write(np.clip(wave, -1.0, 1.0))
        return self.out.taken()

    def end(self) -> bytes:
        self.file.close()
        return self.out.taken()


def _turn_pages_often(file: Any) -> None:
    """libsndfile fills pages of a second before it writes them; soundfile has no word for what changes that."""
    latency = soundfile._ffi.new("double*", _PAGE)
    soundfile._snd.sf_command(file._file, _SET_PAGE_LATENCY, latency, 8)


class _Forward(io.RawIOBase):
    """A file whose bytes are taken as they come; what is written again later does not count."""

    def __init__(self) -> None:
        self.new = bytearray()
        self.at = self.size = 0

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        return 0

    def write(self, data: Any) -> int:
        data = bytes(data)
        late = max(0, self.size - self.at)
        self.new += data[late:]
        self.at += len(data)
        self.size = max(self.size, self.at)
        return len(data)

    def taken(self) -> bytes:
        """What is new."""
        new, self.new = bytes(self.new), bytearray()
        return new
