"""Read and write sound: anything a user hands over -> mono float32 at one rate, or a `ValueError` that says why."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr
import torch

from zipper_lm.codecs.containers import with_true_length
from zipper_lm.codecs.mp3 import with_length
from zipper_lm.codecs.suffixes import named
from zipper_lm.utils.files import new_file
from zipper_lm.utils.places import is_file

SAMPLING_RATE = 16_000
"""Samples per second that every codec here works at."""

MAX_SECONDS = 120.0
HIGHEST_RATE = 1 << 20
"""Samples per second that a header may claim: FLAC's limit, and five times that of any recording."""
MAX_SAMPLES = 1 << 26
"""Samples of all channels that one sound may have before they are averaged (256 MiB): a file of silence is small."""


class _Most(NamedTuple):
    """Of one sound: seconds, and samples of all channels."""

    seconds: float
    samples: int


_WRITTEN = {".wav": "WAV", ".flac": "FLAC"}
_UNKNOWN_FRAMES = 1 << 40  # containers without a length claim absurd ones
_PART = 1 << 14  # frames read at once where it is not known how many there are


def read_audio(source: Any, sampling_rate: int = SAMPLING_RATE, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Read one sound as mono float32 [time] at `sampling_rate`.

    Args:
        source: a path (`str` or `Path`), the `bytes` of a sound file, a tuple ``(array, rate)`` with an array of
            [time] or [time, channels], a dict as in Hugging Face datasets (``{"array", "sampling_rate"}`` or
            ``{"bytes", "path"}``), or a 1-D array or tensor of floats that is already at `sampling_rate`.
            Integer arrays (8, 16 or 32 bits) are scaled to [-1, 1); channels are averaged.
        sampling_rate: samples per second of the result.
        max_seconds: longest sound accepted, checked on the header before anything is decoded.

    Raises:
        ValueError: if the file is missing, empty, cut off or no sound; if the sound has no samples, holds NaN or
            infinity, or lasts longer than `max_seconds`; if the source is of none of the types above.
    """
    check_rate(sampling_rate, "sampling_rate")
    mono, rate, name = _recording(source, sampling_rate, _Most(max_seconds, MAX_SAMPLES))
    if rate != sampling_rate:
        frames = mono.shape[0]
        mono = soxr.resample(mono, rate, sampling_rate, quality="HQ")
        if mono.shape[0] == 0:
            raise ValueError(f"{name}: {frames} samples at {rate} Hz are too few to resample")
    return np.ascontiguousarray(mono, dtype=np.float32)


def read_sound(source: Any) -> np.ndarray:
    """As `read_audio`, of any length that `MAX_SAMPLES` allows: for what reads a sound piece by piece."""
    return read_audio(source, max_seconds=math.inf)


def read_recording(data: bytes, max_seconds: float, max_samples: int) -> tuple[np.ndarray, int]:
    """Read the `bytes` of a sound file as mono float32 [time] at its own rate; returns that, too.

    Args:
        data: the file. max_seconds: as of `read_audio`. max_samples: of all channels, before they are averaged.

    Raises:
        ValueError: as `read_audio`.
    """
    mono, rate, _ = _recording(data, SAMPLING_RATE, _Most(max_seconds, max_samples))
    return mono, rate


def _recording(source: Any, sampling_rate: int, most: _Most) -> tuple[np.ndarray, int, str]:
    """Mono samples [time], their rate, and a name for messages."""
    if not most.seconds > 0:
        raise ValueError(f"max_seconds must be positive, got {most.seconds!r}")
    wave, rate, name = _load(source, sampling_rate, most)
    if wave.shape[0] == 0:
        raise ValueError(f"{name}: the sound has no samples")
    _check_length(wave.shape[0], rate, most.seconds, name)
    if not np.isfinite(wave).all():
        raise ValueError(f"{name}: the sound holds NaN or infinite samples")
    return wave if wave.ndim == 1 else wave.mean(axis=1, dtype=np.float32), rate, name


def write_audio(path: str | Path, wave: Any, sampling_rate: int = SAMPLING_RATE) -> None:
    """Write `wave` [time] as 16-bit WAV or FLAC, by suffix; the file appears whole or not at all.

    Samples beyond [-1, 1] are clipped.

    Raises:
        ValueError: on another suffix, an unwritable folder, an empty, non-finite or not one-dimensional wave.
    """
    path = Path(path)
    check_rate(sampling_rate, "sampling_rate")
    form = _WRITTEN.get(path.suffix.lower())
    if form is None:
        raise ValueError(f"{path}: suffix must be one of {sorted(_WRITTEN)}, got {path.suffix!r}")
    samples = _scaled(wave, "wave")
    if samples.ndim != 1 or samples.shape[0] == 0:
        raise ValueError(f"wave must be a non-empty 1-D array, got shape {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError("wave holds NaN or infinite samples")
    with new_file(path, overwrite=True) as file:
        soundfile.write(file, np.clip(samples, -1.0, 1.0), sampling_rate, format=form, subtype="PCM_16")


def _load(source: Any, sampling_rate: int, most: _Most) -> tuple[np.ndarray, int, str]:
    """Samples [time] or [time, channels], their rate, and a name for messages."""
    if isinstance(source, str):
        return _load_path(named(source, "audio"), most)
    if isinstance(source, os.PathLike):
        return _load_path(Path(source), most)
    if isinstance(source, bytes | bytearray | memoryview):
        return _load_bytes(bytes(source), "audio bytes", most)
    if isinstance(source, Mapping):
        return _load_mapping(source, most)
    if isinstance(source, tuple):
        return _load_pair(source)
    if isinstance(source, np.ndarray | torch.Tensor | list):
        wave = _scaled(source, "audio array")
        if wave.ndim != 1:
            raise ValueError(
                f"audio array must be 1-D [time], got shape {wave.shape}; "
                "pass several channels as a tuple ([time, channels], rate)"
            )
        return wave, sampling_rate, "audio array"
    raise ValueError(
        "audio must be a path, bytes, an (array, rate) tuple, a dict with 'array' or 'bytes', "
        f"or a 1-D array, got {type(source).__name__}"
    )


def _load_path(path: Path, most: _Most) -> tuple[np.ndarray, int, str]:
    if not is_file(path):
        raise ValueError(f"{path!s:.200}: {'is not a file' if os.path.exists(path) else 'no such audio file'}")
    try:
        with path.open("rb") as file:
            return _decode(file, str(path), most)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error


def _load_bytes(data: bytes, name: str, most: _Most) -> tuple[np.ndarray, int, str]:
    return _decode(io.BytesIO(data), name, most)


def _load_mapping(source: Mapping[str, Any], most: _Most) -> tuple[np.ndarray, int, str]:
    path = source.get("path")
    if source.get("array") is not None:
        if source.get("sampling_rate") is None:
            raise ValueError("audio dict has 'array' but no 'sampling_rate'")
        name = f"audio dict {path!r}" if path else "audio dict"
        wave = _scaled(source["array"], f"{name}, field 'array'")
        if wave.ndim != 1:
            raise ValueError(f"{name}, field 'array' must be 1-D [time], got shape {wave.shape}")
        return wave, check_rate(source["sampling_rate"], f"{name}, field 'sampling_rate'"), name
    if isinstance(source.get("bytes"), bytes | bytearray | memoryview):
        return _load_bytes(bytes(source["bytes"]), str(path) if path else "audio bytes", most)
    if path and isinstance(path, str | os.PathLike) and source.get("bytes") is None:
        return _load(path, 1, most)
    raise ValueError(f"audio dict must have 'array' and 'sampling_rate', or 'bytes' or 'path', got {sorted(source)}")


def _load_pair(source: tuple[Any, ...]) -> tuple[np.ndarray, int, str]:
    if len(source) != 2 or np.ndim(source[1]) != 0 or np.ndim(source[0]) == 0:
        raise ValueError("audio tuple must be (array, rate), in this order")
    wave = _scaled(source[0], "audio tuple")
    if wave.ndim not in (1, 2):
        raise ValueError(f"audio tuple: array must be [time] or [time, channels], got shape {wave.shape}")
    if wave.ndim == 2 and (wave.shape[1] == 0 or wave.shape[1] > max(wave.shape[0], 1)):
        raise ValueError(f"audio tuple: array must be [time, channels], got shape {wave.shape}; transpose it")
    return wave, check_rate(source[1], "audio tuple: rate"), "audio tuple"


def _decode(file: BinaryIO, name: str, most: _Most) -> tuple[np.ndarray, int, str]:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise ValueError(f"{name}: the file is empty")
    file.seek(0)
    file = _checked_container(file, size, name)
    file.seek(0)
    try:
        with _InOrder(file) as sound:
            rate, promised = check_rate(sound.samplerate, f"{name}: its sampling rate"), int(sound.frames)
            known = 0 <= promised < _UNKNOWN_FRAMES
            if known:
                _check_length(promised, rate, most.seconds, name)
                _check_samples(promised, sound.channels, most, name)
                wave = sound.read(promised, dtype="float32")
            else:
                wave = _to_its_end(sound, min(most.seconds * rate, most.samples / sound.channels))
                _check_samples(wave.shape[0], sound.channels, most, name)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ValueError):
            raise
        why = getattr(error, "error_string", error)  # without the file, which may be bytes at some address
        raise ValueError(f"{name}: not a sound file, or a damaged or cut off one ({why})") from error
    if known and wave.shape[0] < promised:
        raise ValueError(f"{name}: the file is cut off: {wave.shape[0]} of {promised} frames could be decoded")
    return wave, rate, name


class _InOrder(soundfile.SoundFile):
    """Read from its start to its end: libsndfile cannot seek in a FLAC file that does not say how long it is, and
    soundfile seeks after each reading where it is told that this is possible."""

    def seekable(self) -> bool:
        return False


def _to_its_end(sound: soundfile.SoundFile, most: float) -> np.ndarray:
    """All frames, part by part; of more than `most` the first, and a few more."""
    parts, count = [sound.read(_PART, dtype="float32")], 0
    while len(parts[-1]) == _PART and (count := count + _PART) <= most:
        parts.append(sound.read(_PART, dtype="float32"))
    return np.concatenate(parts)


def _check_samples(frames: int, channels: int, most: _Most, name: str) -> None:
    if frames * channels > most.samples:
        raise ValueError(
            f"{name}: {frames} frames of {channels} channels, more than the limit of {most.samples} samples"
        )


def _checked_container(file: BinaryIO, size: int, name: str) -> BinaryIO:
    """Find cuts that libsndfile hides: it trims the frame count of most files to what is there, and guesses that of an
    MP3 file which does not say it. Returns the file, or one that says it."""
    magic = file.read(4)
    if magic == b"OggS":
        _check_ogg(file, size, name)
    elif magic[:3] == b"ID3" or (magic[0] == 0xFF and magic[1:] and magic[1] >= 0xE0):
        file.seek(0)
        try:
            return io.BytesIO(with_length(file.read()))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return with_true_length(file, name)


def _check_ogg(file: BinaryIO, size: int, name: str) -> None:
    """The last Ogg page must be whole (RFC 3533, section 6: 27 bytes, then the table of segment lengths)."""
    file.seek(max(0, size - 2 * 65_307))  # two pages of the greatest size
    tail = file.read()
    start = tail.rfind(b"OggS")
    table = tail[start + 27 : start + 27 + tail[start + 26]] if start + 26 < len(tail) else b""
    if start >= 0 and (not table or start + 27 + len(table) + sum(table) > len(tail)):
        raise ValueError(f"{name}: the file is cut off within its last page")


def _scaled(values: Any, name: str) -> np.ndarray:
    """Any array to float32; integers to [-1, 1) by their type's range."""
    if isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
        values = tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} must be an array of numbers ({error})") from error
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128.0) / 128.0
    if array.dtype in (np.int8, np.int16, np.int32):
        return (array / -float(np.iinfo(array.dtype).min)).astype(np.float32)
    if np.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is reported as such
            return array.astype(np.float32)
    raise ValueError(f"{name} must hold floats or 8, 16 or 32 bit integers, got {array.dtype}")


def check_rate(rate: Any, name: str) -> int:
    """A sampling rate as a whole number.

    Raises:
        ValueError: naming `name`, if it is none, or above `HIGHEST_RATE`.
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or int(rate) != rate or rate <= 0:
        raise ValueError(f"{name} must be a positive whole number of Hz, got {rate!r}")
    if rate > HIGHEST_RATE:
        raise ValueError(f"{name} must be at most {HIGHEST_RATE} Hz, got {rate!r}")
    return int(rate)


def _check_length(frames: int, rate: int, max_seconds: float, name: str) -> None:
    if frames > max_seconds * rate:
        raise ValueError(f"{name}: lasts {frames / rate:.1f} s, more than the limit max_seconds={max_seconds:g}")
