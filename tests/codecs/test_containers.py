"""Sound whose header does not say how long it is, and sound that is cut off."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
import soundfile

from zipper_lm.codecs import audio
from zipper_lm.codecs.audio import read_audio

TONE = (0.5 * np.sin(np.arange(20_000))).astype(np.float32)


def written(form: str, subtype: str | None = "PCM_16", channels: int = 1, endian: str | None = None) -> bytes:
    file = io.BytesIO()
    wave = np.repeat(TONE[:, None], channels, axis=1)
    soundfile.write(file, wave, 16_000, format=form, subtype=subtype, endian=endian)
    return file.getvalue()


def put(data: bytes, at: int, form: str, value: int) -> bytes:
    end = at + struct.calcsize(form)
    return data[:at] + struct.pack(form, value & ((1 << 8 * (end - at)) - 1)) + data[end:]


def wav(data: bytes, said: int) -> bytes:
    data = put(data, 4, "<I", min(said + 36, 0xFFFF_FFFF) if said else 36)
    return put(data, data.index(b"data") + 4, "<I", said)


def rifx(data: bytes, said: int) -> bytes:
    return put(data, data.index(b"data") + 4, ">I", said)


def rf64(data: bytes, said: int) -> bytes:
    return put(put(data, data.index(b"ds64") + 8, "<Q", said), data.index(b"ds64") + 16, "<Q", said)


def w64(data: bytes, said: int) -> bytes:
    return put(put(data, 16, "<Q", said), data.index(b"data") + 16, "<Q", said)


def aiff(data: bytes, said: int) -> bytes:
    """As a program does that counts frames: the length of the file and the number of frames are as wrong."""
    data = put(put(data, 4, ">I", said), data.index(b"COMM") + 10, ">I", said // 2)
    return put(data, data.index(b"SSND") + 4, ">I", said)


def au(data: bytes, said: int) -> bytes:
    return put(data, 8, ">I", said)


def little_au(data: bytes, said: int) -> bytes:
    return put(data, 8, "<I", said)


def caf(data: bytes, said: int) -> bytes:
    return put(data, data.index(b"data") + 4, ">Q", said)


ALL_ONES = -1
FORMS: list[tuple[str, bytes, Callable[[bytes, int], bytes], list[int]]] = [
    ("WAV", written("WAV"), wav, [0, ALL_ONES, 0x7FFF_F000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF - 36]),
    ("WAV, 24 bits", written("WAV", "PCM_24", 2), wav, [0, ALL_ONES, 0x7FFF_F000 // 6 * 6]),
    ("WAV, extensible", written("WAVEX"), wav, [0, ALL_ONES, 0x7FFF_F000]),
    ("WAV, floats", written("WAV", "FLOAT"), wav, [0, ALL_ONES, 0x7FFF_F000]),
    ("WAV, mu-law", written("WAV", "ULAW"), wav, [0, ALL_ONES, 0x7FFF_F000]),
    ("WAV, big-endian", written("WAV", endian="BIG"), rifx, [0, ALL_ONES, 0x7FFF_F000]),
    ("RF64", written("RF64"), rf64, [0, ALL_ONES, (1 << 63) - 1]),
    ("W64", written("W64"), w64, [0, 24, ALL_ONES, (1 << 63) - 1]),
    ("AIFF", written("AIFF"), aiff, [0, 8, ALL_ONES, 0x7F00_0000 + 8]),
    ("AIFF, 24 bits", written("AIFF", "PCM_24", 2), aiff, [0, 8, ALL_ONES, 0x7F00_0000 // 6 * 6 + 8]),
    ("AU", written("AU"), au, [0, ALL_ONES, 0x7FFF_FFFF]),
    ("AU, little-endian", written("AU", endian="LITTLE"), little_au, [0, ALL_ONES]),
    ("CAF", written("CAF"), caf, [0, 4, ALL_ONES]),
]
CASES = [pytest.param(data, say, said, id=f"{n} {said:#x}") for n, data, say, all_said in FORMS for said in all_said]


@pytest.mark.parametrize(("data", "say", "said"), CASES)
def test_a_length_that_says_nothing_is_the_end_of_the_file(
    data: bytes, say: Callable[[bytes, int], bytes], said: int
) -> None:
    """sox writes 0x7FFFF000 to a pipe, others zeros or all ones: such sound was cut off, of no samples or no sound."""
    whole = read_audio(data)
    assert len(whole) == len(TONE)
    assert np.array_equal(read_audio(say(data, said)), whole)


@pytest.mark.parametrize(("name", "data", "say"), [pytest.param(n, d, s, id=n) for n, d, s, _ in FORMS])
def test_what_is_cut_off_is_told(name: str, data: bytes, say: object) -> None:
    """libsndfile gives what is there, of every form but FLAC and Ogg; only in WAV that was seen."""
    for part in (0.3, 0.97):
        with pytest.raises(ValueError, match="cut off"):
            read_audio(data[: int(len(data) * part)])
    for size in (1, 8, 11):  # within the header
        with pytest.raises(ValueError, match=r"cut off|no samples"):
            read_audio(data[:size])


def flac(total: int) -> bytes:
    """As from a pipe: without the number of samples, and without their MD5."""
    data = written("FLAC")
    (bits,) = struct.unpack(">Q", data[18:26])
    return data[:18] + struct.pack(">Q", bits >> 36 << 36 | total) + bytes(16) + data[42:]


def test_flac_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """libsndfile could not seek in it, and seeks after each reading."""
    assert np.array_equal(read_audio(flac(0)), read_audio(written("FLAC")))
    for cut in (1, 100, 3000):
        with pytest.raises(ValueError, match="cut off"):
            read_audio(flac(0)[:-cut])
    monkeypatch.setattr(audio, "MAX_SAMPLES", 19_999)
    with pytest.raises(ValueError, match="20000 frames of 1 channels, more than the limit"):
        read_audio(flac(0))
    with pytest.raises(ValueError, match=r"lasts 1\.\d s, more than the limit max_seconds=0\.5"):
        read_audio(flac(0), max_seconds=0.5)


def test_an_empty_sound_with_chunks_behind_it_is_empty() -> None:
    data = written("WAV")
    empty = wav(data[: data.index(b"data") + 8], 0) + struct.pack("<4sI4s", b"LIST", 4, b"INFO")
    with pytest.raises(ValueError, match="no samples"):
        read_audio(empty)
    with pytest.raises(ValueError, match="no samples"):
        read_audio(wav(data[: data.index(b"data") + 8], 0))
    silence = wav(data[: data.index(b"data") + 8], 0) + bytes(3200)  # zeros are no names of chunks
    assert read_audio(silence).shape == (1600,)


def test_a_file_on_disk_is_read_in_place(tmp_path: object) -> None:
    path = tmp_path / "x.w64"  # type: ignore[operator]
    path.write_bytes(w64(written("W64"), -1))
    assert len(read_audio(path)) == len(TONE)
