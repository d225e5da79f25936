"""Sound as bytes: each form is played back, and can be from its first piece on."""

import numpy as np
import pytest
from tiny_served import voice

from zipper_lm.codecs.audio import read_audio
from zipper_lm.serve.forms import MEDIA, RATE, Encoder, encoded


def likeness(wave: np.ndarray, other: np.ndarray) -> float:
    """Correlation at the best shift: some forms begin with silence."""
    inner = other[4000:20_000]
    found = np.correlate(wave[:24_000], inner, "valid")
    at = int(found.argmax())
    return float(np.corrcoef(wave[at : at + len(inner)], inner)[0, 1])


@pytest.mark.parametrize("form", sorted(MEDIA))
def test_what_is_played_is_what_was_said(form: str) -> None:
    said = voice(2.0)
    data = encoded(said, form)
    played = np.frombuffer(data, "<i2") / 32768 if form == "pcm" else read_audio(data, RATE)
    assert abs(len(played) - 2 * RATE) < (2000 if form == "mp3" else 2)
    assert likeness(played, read_audio((said, 16_000), RATE)) > 0.99


@pytest.mark.parametrize("form", sorted(MEDIA))
def test_pieces_come_as_they_are_given(form: str) -> None:
    """No piece waits for a second of sound, as libsndfile's Ogg pages would."""
    said, encoder = voice(2.0), Encoder(form)
    sizes = [len(encoder.add(said[i : i + 6400])) for i in range(0, len(said), 6400)]
    assert min(sizes) > 100


@pytest.mark.parametrize("form", sorted(MEDIA))
def test_the_first_piece_can_be_played(form: str) -> None:
    from zipper_lm.serve.forms import Encoder

    first = Encoder(form).add(voice(1.0))
    if form in ("pcm", "flac", "mp3"):  # their readers here want whole frames
        assert len(first) > 500
        return
    if form == "wav":
        assert len(read_audio(first, RATE)) > 0.9 * RATE
        return
    import io

    import soundfile

    with soundfile.SoundFile(io.BytesIO(first)) as sound:
        assert len(sound.read(20_000)) > 10_000


@pytest.mark.parametrize("form", sorted(MEDIA))
def test_nothing_is_an_empty_sound(form: str) -> None:
    assert isinstance(encoded(np.zeros(0, dtype=np.float32), form), bytes)


def test_a_stream_is_resampled_as_a_whole() -> None:
    """Pieces of 24 kHz, laid end to end, are what the whole sound is at 24 kHz: no seam of filters between them."""
    said = voice(2.0)
    encoder = Encoder("pcm")
    pieces = b"".join(encoder.add(said[i : i + 777]) for i in range(0, len(said), 777)) + encoder.end()
    assert np.abs(np.frombuffer(pieces, "<i2").astype(int) - np.frombuffer(encoded(said, "pcm"), "<i2")).max() <= 1


def test_too_loud_is_clipped() -> None:
    assert np.frombuffer(encoded(np.full(1600, 3.0, dtype=np.float32), "pcm"), "<i2").min() >= 0
