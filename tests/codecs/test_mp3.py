"""MP3 files with and without a note of their length."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from zipper_lm.codecs.audio import read_audio
from zipper_lm.codecs.mp3 import with_length

SECONDS = 6


def encoded(rate: int, mode: str, channels: int, *, loud_first: bool = True) -> bytes:
    """Noise that is loud for a quarter of the time."""
    count = SECONDS * rate
    loud = np.arange(count) < count // 4 if loud_first else np.arange(count) >= 3 * count // 4
    wave = np.random.default_rng(0).standard_normal((count, channels)) * np.where(loud, 0.3, 1e-4)[:, None]
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="MP3", bitrate_mode=mode, compression_level=0.4)
    return file.getvalue()


def without_note(data: bytes) -> bytes:
    """From the second frame on: two bytes of sync, and two that are alike in all frames of a version and layer."""
    return data[data.index(data[:2], 4) :]


@pytest.mark.parametrize("rate", [8_000, 24_000, 44_100])
@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("loud_first", [True, False])
def test_a_file_that_does_not_say_its_length_is_read_whole(
    rate: int, mode: str, channels: int, loud_first: bool
) -> None:
    """libsndfile took the length from the first frame's bit rate: 2 of 10 seconds were read, and nothing said, or a
    whole file was refused as cut off."""
    data = encoded(rate, mode, channels, loud_first=loud_first)
    assert with_length(data) is data, "it says it"
    bare = without_note(data)
    assert len(read_audio(bare)) == pytest.approx(len(read_audio(data)), abs=2500)
    tagged = b"ID3\x04\x00\x00\x00\x00\x00\x0a" + b"\0" * 10 + bare
    assert len(read_audio(tagged)) == len(read_audio(bare))


def test_a_cut_is_found() -> None:
    bare = without_note(encoded(16_000, "CONSTANT", 1))
    with pytest.raises(ValueError, match="cut off within its last frame"):
        read_audio(bare[:-10])
    assert with_length(bare + b"TAG" + b"\0" * 125)[-len(bare) - 128 :] == bare + b"TAG" + b"\0" * 125


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xfb\x90\x00" + b"x" * 2000, b"RIFF" * 20])
def test_what_is_no_mp3_stays_as_it_is(data: bytes) -> None:
    assert with_length(data) is data
