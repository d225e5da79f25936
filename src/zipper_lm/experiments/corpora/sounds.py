"""sounds: notes of a few synthetic instruments, one to three in a row, and captions that name them in order.

"loud high flute then quiet low bell": loudness, pitch and source, each varied in ways the caption does not tell
(tuning, vibrato, brightness, attack, length, pauses). All are heard before the same faint noise, which makes loudness
audible even where a codec evens out the level of a whole clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zipper_lm.codecs.audio import SAMPLING_RATE, write_audio
from zipper_lm.experiments.corpora.writing import write_corpus

SOURCES = ("flute", "bell", "organ", "string", "drum", "siren")
PITCHES = {"low": (110.0, 220.0), "high": (440.0, 880.0)}
"""Range of the fundamental in Hz."""
LOUDNESS = {"quiet": 0.03, "loud": 0.5}
"""Peak of a note, before it varies by 2 dB either way."""
NOISE = 0.002
MOST = 3
SIZES = {"train": 3000, "validation": 100, "test": 300, "judge": 2500}
SEED = 0


def write_sounds(folder: str | Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write rows ``{"sound": file, "text": caption}`` in splits train, validation, test and judge; no two clips alike.

    Args:
        folder: to be made. overwrite: replace what is there.

    Returns:
        Rows in each split.

    Raises:
        ValueError: as `write_corpus`.
    """
    streams = dict(zip(SIZES, np.random.SeedSequence(SEED).spawn(len(SIZES))))

    def rows(split: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        rng = np.random.default_rng(streams[split])
        for _ in range(SIZES[split]):
            wave, caption = clip(rng)
            yield wave, {"text": caption}

    return write_corpus(folder, {s: rows(s) for s in SIZES}, "sound", ".flac", write_audio, overwrite=overwrite)


def clip(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """One clip: float32 ``[samples]`` at 16 kHz, and its caption."""
    parts, names = [_quiet(rng)], []
    for _ in range(int(rng.integers(1, MOST + 1))):
        loudness, pitch, source = (str(rng.choice(list(x))) for x in (LOUDNESS, PITCHES, SOURCES))
        low, high = PITCHES[pitch]
        tone = note(source, float(np.exp(rng.uniform(np.log(low), np.log(high)))), rng)
        level = LOUDNESS[loudness] * 10 ** (rng.uniform(-2, 2) / 20)
        parts += [level * tone / np.abs(tone).max(), _quiet(rng)]
        names.append(f"{loudness} {pitch} {source}")
    wave = np.concatenate(parts)
    noisy = wave + NOISE * rng.standard_normal(len(wave))
    return np.clip(noisy, -1, 1).astype(np.float32), " then ".join(names)


def note(source: str, hertz: float, rng: np.random.Generator) -> np.ndarray:
    """One note, float64 ``[samples]`` at 16 kHz, 0.5 to 0.8 s, of any level.

    Args:
        source: one of `SOURCES`. hertz: its fundamental. rng: for what the caption does not tell.

    Raises:
        ValueError: for another source.
    """
    t = np.arange(int(rng.uniform(0.5, 0.8) * SAMPLING_RATE)) / SAMPLING_RATE
    bright, fade = rng.uniform(0.8, 1.2), t[-1] - t
    rise = np.minimum(1, np.minimum(t / rng.uniform(0.02, 0.06), fade / 0.03))
    if source == "flute":  # nearly a sine, trembling, with breath
        vibrato = rng.uniform(0.004, 0.01) * np.sin(2 * np.pi * rng.uniform(4, 6) * t)
        breath = 0.02 * rng.standard_normal(len(t))
        return rise * (_partials(t * (1 + vibrato / 2), hertz, [1, 0.15 * bright]) + breath)
    if source == "bell":  # partials that are no multiples, each dying away (ratios of a church bell)
        ratios, decays = (0.5, 1.0, 1.19, 1.56, 2.0, 2.51, 3.01), (2, 3, 4, 5, 6, 8, 10)
        dying = [np.exp(-d * t * bright) * np.sin(2 * np.pi * r * hertz * t) for r, d in zip(ratios, decays)]
        return np.sum(dying, axis=0)
    if source == "organ":  # octaves and fifths, steady
        return rise * _partials(t, hertz, [1, 0.8, 0.5 * bright, 0.6, 0, 0.3 * bright, 0, 0.4])
    if source == "string":  # plucked: a bright start that dulls
        audible = [k for k in range(1, 13) if k * hertz < 7500]
        dulling = [np.exp(-(2 + 1.5 * k) * t / bright) * np.sin(2 * np.pi * k * hertz * t) / k for k in audible]
        return np.sum(dulling, axis=0)
    if source == "drum":  # a falling thump and noise; its pitch is heard in the thump
        sweep = hertz * (t + 0.03 * (1 - np.exp(-t / 0.03)))
        return np.exp(-9 * t) * np.sin(2 * np.pi * sweep) + 0.6 * bright * np.exp(-25 * t) * rng.standard_normal(len(t))
    if source == "siren":  # a buzz that glides up and down
        glide = hertz * (t + 0.04 * np.sin(2 * np.pi * 3 * t) / (2 * np.pi))
        return rise * sum(np.sin(2 * np.pi * k * glide) / k for k in range(1, 20, 2) if k * hertz < 6000)
    raise ValueError(f"source must be one of {SOURCES}, got {source!r}")


def _partials(t: np.ndarray, hertz: float, levels: list[float]) -> np.ndarray:
    return sum((a * np.sin(2 * np.pi * k * hertz * t) for k, a in enumerate(levels, 1)), np.zeros(len(t)))


def _quiet(rng: np.random.Generator) -> np.ndarray:
    return np.zeros(int(rng.uniform(0.05, 0.15) * SAMPLING_RATE))
