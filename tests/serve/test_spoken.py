"""Sound that is decoded in pieces has no seams."""

from typing import Any

import numpy as np
import pytest
from tiny_served import codecs, voice

from zipper_lm.codecs.speech import SpeechCodec
from zipper_lm.serve.spoken import FIRST, Spoken


def pieces_of(spoken: Spoken, ids: list[int]) -> list[np.ndarray]:
    found = [spoken.take() for token in ids if spoken.add(token)]
    return [*found, spoken.end()]


def roughness(wave: np.ndarray, places: list[int], width: int = 64) -> float:
    """Energy of the second difference around some places, against that of the whole: a click has much."""
    bend = np.diff(wave, 2) ** 2
    there = np.mean([bend[p - width : p + width].mean() for p in places])
    return float(there / bend.mean())


@pytest.fixture(scope="module", params=["looked up", "decoded"])
def said(request: pytest.FixtureRequest) -> tuple[Any, list[int]]:
    """A codec, which has a decoder or not, and ids of a sound."""
    codec = codecs()["speech"]
    if request.param == "decoded":
        codec = SpeechCodec(codec.config, codec.centroids, codec.scale, codec.mels)
        codec.fit_decoder([voice(3.0, seed) for seed in range(4)], 80, width=32)
    return codec, codec.encode([voice(8.0, seed=5)])[0]


def test_energy_at_the_seams(said: tuple[Any, list[int]]) -> None:
    """At the seams it is as inside; pieces that are decoded apart and laid end to end click there."""
    codec, ids = said
    pieces = pieces_of(Spoken(codec), ids)
    seams = np.cumsum([len(p) for p in pieces])[:-1].tolist()
    assert len(seams) >= 8
    ours = roughness(np.concatenate(pieces), seams)
    apart = [codec.decode([ids[i : i + 20]])[0] for i in range(0, len(ids), 20)]
    naive = roughness(np.concatenate(apart), np.cumsum([len(p) for p in apart])[:-1].tolist())
    assert ours < 1.5
    assert naive > 3 * ours


def test_levels_at_the_seams(said: tuple[Any, list[int]]) -> None:
    """Nothing fades at a seam: around each, the level is that of the whole sound decoded in one go."""
    codec, ids = said
    pieces = pieces_of(Spoken(codec), ids)
    wave, whole = np.concatenate(pieces), codec.decode([ids])[0]
    assert abs(len(wave) - len(whole)) < 0.02 * len(whole)
    for seam in np.cumsum([len(p) for p in pieces])[:-1]:
        ours, theirs = (np.sqrt(np.mean(w[seam - 400 : seam + 400] ** 2)) for w in (wave, whole))
        assert 0.5 < ours / theirs < 2.0


def test_first_sound_comes_early(said: tuple[Any, list[int]]) -> None:
    codec, ids = said
    spoken = Spoken(codec)
    count = next(n for n, token in enumerate(ids, 1) if spoken.add(token))
    assert count <= FIRST
    assert len(spoken.take()) > 0.2 * 16_000


@pytest.mark.parametrize("count", [0, 1, 2, 14, 15, 16, 33])
def test_any_number_of_tokens(said: tuple[Any, list[int]], count: int) -> None:
    codec, ids = said
    wave = np.concatenate(pieces_of(Spoken(codec), ids[:count]))
    assert abs(len(wave) - 640 * count) <= 320


class Frames:
    """A codec of two codebooks, whose sound of a frame is two numbers; ids out of order are dropped."""

    rate, codebooks = 100.0, 2

    def decode(self, rows: list[list[int]]) -> list[np.ndarray]:
        frames, first = [], None
        for i in rows[0]:
            if i < 100:
                first = i
            elif first is not None:
                frames.append((first, i))
                first = None
        return [np.concatenate([np.full(320, (a + b) / 300, dtype=np.float32) for a, b in frames] or [np.zeros(0)])]


def test_frames_are_decoded_whole_and_in_their_place() -> None:
    ids = [n for frame in range(200) for n in (frame % 100, 100 + frame % 100)]
    wave = np.concatenate(pieces_of(Spoken(Frames()), ids))
    whole = Frames().decode([ids])[0]
    assert abs(len(wave) - len(whole)) <= 320
    count = min(len(wave), len(whole)) // 2  # shifts at seams add up
    assert np.corrcoef(wave[:count], whole[:count])[0, 1] > 0.95


def test_tokens_that_are_dropped() -> None:
    """A tower may write ids out of order, which have no sound: what comes after is in its place nevertheless."""
    ids = [n for frame in range(100) for n in (frame, 100 + frame, *([7] if frame % 10 == 0 else []))]
    wave = np.concatenate(pieces_of(Spoken(Frames()), ids))
    assert abs(len(wave) - len(Frames().decode([ids])[0])) <= 640
