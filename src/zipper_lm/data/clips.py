"""Connected speech from single recordings: clips of one speaker, joined with short pauses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from zipper_lm.codecs.audio import SAMPLING_RATE, read_audio
from zipper_lm.data.broken import Broken
from zipper_lm.data.document import Document
from zipper_lm.data.sources.readers import Rows

PAUSE_SECONDS = (0.05, 0.12)
EDGE_SECONDS = (0.03, 0.1)


def recombine(
    rows: Sequence[dict[str, Any]],
    count: int,
    *,
    words: int = 5,
    seed: int = 0,
    speaker: str = "speaker",
    broken: Broken | None = None,
) -> Iterator[dict[str, Any]]:
    """New utterances of 1 to `words` clips, each of one speaker.

    Args:
        rows: clips, as ``{"speech": anything read_audio reads, "text": what it says, speaker: who}``.
        count: how many utterances.
        words: the most clips in one.
        seed: of the draw.
        speaker: the column that names the speaker; clips without it count as one speaker's.
        broken: where clips that cannot be read are listed, up to its limit; `None` allows none.

    Returns:
        Rows with ``speech`` as float32 ``[time]`` at 16 kHz, ``text``, and the speaker.

    Raises:
        ValueError: if there are no clips, or none that can be read, too many cannot, or a number is below 1.
    """
    if not len(rows) or count < 1 or words < 1:
        raise ValueError(f"recombine: needs clips and count, words >= 1; got {len(rows)} clips, {count=}, {words=}")
    clips: dict[Any, list[tuple[np.ndarray, str]]] = defaultdict(list)
    broken = broken or Broken()
    for number in range(len(rows)):
        try:
            row = rows[number]
            if missing := [n for n in ("speech", "text") if isinstance(row, Document) or row.get(n) is None]:
                raise ValueError(f"a clip needs speech and its text, this one has no {missing}")
            wave = read_audio(row["speech"])
            clips[row.get(speaker)].append((wave, row["text"]))
        except ValueError as error:
            broken.add(f"clips: {rows.where(number) if isinstance(rows, Rows) else number}", error)
    if not clips:
        raise ValueError(f"recombine: none of {len(rows)} clips can be read: {broken.told()}")
    return _utterances(clips, count, words, seed, speaker)


def _utterances(
    clips: Mapping[Any, Sequence[tuple[np.ndarray, str]]], count: int, words: int, seed: int, speaker: str
) -> Iterator[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    speakers = sorted(clips, key=str)

    def silence(low: float, high: float) -> np.ndarray:
        return np.zeros(int(draw.uniform(low, high) * SAMPLING_RATE), dtype=np.float32)

    for _ in range(count):
        who = speakers[draw.integers(len(speakers))]
        chosen = [clips[who][i] for i in draw.integers(len(clips[who]), size=draw.integers(1, words + 1))]
        parts = [silence(*EDGE_SECONDS)]
        for wave, _text in chosen:
            parts += [wave, silence(*PAUSE_SECONDS)]
        parts[-1] = silence(*EDGE_SECONDS)
        yield {"speech": np.concatenate(parts), "text": " ".join(t for _, t in chosen), speaker: who}
