"""Clips of one speaker, joined."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from zipper_lm.data.broken import Broken
from zipper_lm.data.clips import recombine

CLIPS = [
    {"speech": np.full(1600, level, np.float32), "text": word, "speaker": who}
    for who, level in (("ann", 0.25), ("bob", 0.5))
    for word in ("one", "two")
]


def test_one_speaker_each_and_the_right_words() -> None:
    made = list(recombine(CLIPS, 40, words=3, seed=1))
    assert len(made) == 40
    counts = set()
    for row in made:
        levels = set(np.unique(row["speech"])) - {0.0}
        assert levels == {0.25 if row["speaker"] == "ann" else 0.5}
        words = row["text"].split()
        assert (row["speech"] != 0).sum() == 1600 * len(words)
        assert row["speech"][0] == row["speech"][-1] == 0
        assert row["speech"].dtype == np.float32
        counts.add(len(words))
    assert counts == {1, 2, 3}
    assert {row["speaker"] for row in made} == {"ann", "bob"}


def test_the_same_seed_makes_the_same() -> None:
    first, again, other = (list(recombine(CLIPS, 5, seed=s)) for s in (1, 1, 2))
    assert all(np.array_equal(a["speech"], b["speech"]) for a, b in zip(first, again))
    assert [r["text"] for r in first] != [r["text"] for r in other]


def test_clips_without_a_speaker_are_one_speakers() -> None:
    clips = [{k: v for k, v in c.items() if k != "speaker"} for c in CLIPS]
    assert len(list(recombine(clips, 3))) == 3


def test_clips_that_cannot_be_read_are_left_out_and_listed(tmp_path: Path) -> None:
    """One broken clip ended a run, whatever data.broken_limit said."""
    (tmp_path / "no.wav").write_bytes(b"RIFF")
    clips = [*CLIPS, {"speech": str(tmp_path / "no.wav"), "text": "three", "speaker": "cid"}]
    broken = Broken(1)
    assert {row["speaker"] for row in recombine(clips, 20, broken=broken)} == {"ann", "bob"}
    assert [item["source"] for item in broken.items] == ["clips: 4"]
    with pytest.raises(ValueError, match="clips: 4"):
        recombine(clips, 20)
    with pytest.raises(ValueError, match="none of 1 clips can be read"):
        recombine(clips[-1:], 20, broken=Broken(1))


def test_clips_without_text_are_told() -> None:
    """A folder of files alone ended in KeyError: 'text'."""
    with pytest.raises(ValueError, match=r"clips: 0: a clip needs speech and its text, this one has no \['text'\]"):
        recombine([{"speech": CLIPS[0]["speech"]}], 1)


@pytest.mark.parametrize(("clips", "count", "words"), [([], 1, 1), (CLIPS, 0, 1), (CLIPS, 1, 0)])
def test_refused_at_once(clips: list, count: int, words: int) -> None:
    with pytest.raises(ValueError, match="recombine"):
        recombine(clips, count, words=words)
