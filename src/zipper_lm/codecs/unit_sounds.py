"""Units that are fitted on the user's own sound: their centroids, and what each of them stands for in it.

A unit's sound is the mean of its log-mel frames, and lasts as long as its mean run; a decoder that sees its neighbours
may be trained on the same (`zipper_lm.codecs.mel_decoder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zipper_lm.codecs.audio import SAMPLING_RATE, read_sound
from zipper_lm.codecs.kmeans import ENOUGH, fit_centroids, means, nearest
from zipper_lm.codecs.mel import BANDS, HOP, log_mel, mel_to_sound, normalise_loudness
from zipper_lm.codecs.mel_decoder import MelDecoder, MelDecoderConfig, fit_mel_decoder
from zipper_lm.codecs.mel_vocoder import MelVocoder
from zipper_lm.codecs.speech_encoder import SpeechEncoder, features, pooled
from zipper_lm.codecs.spelling_projection import SpellingProjection, fit_spelling_projection
from zipper_lm.utils.progress import run_bar

LONGEST_RUN = 10_000
"""Of one unit, on average: more than there are in the longest sound that is read."""


@dataclass(frozen=True, kw_only=True)
class UnitSounds:
    """What each of K units stands for in the sound that a codebook was fitted on.

    Args:
        mels: float32 [K, frames, 80], mean log-mel frames of 10 ms. runs: float32 [K], mean length of a run of it.
    """

    mels: Tensor
    runs: Tensor

    def __post_init__(self) -> None:
        if self.mels.ndim != 3 or self.mels.shape[2] != BANDS or self.runs.shape != self.mels.shape[:1]:
            shapes = [list(self.mels.shape), list(self.runs.shape)]
            raise ValueError(f"hubert-units: mels and runs must be [units, frames, {BANDS}] and [units], got {shapes}")
        if not (torch.isfinite(self.runs).all() and (self.runs <= LONGEST_RUN).all()):
            raise ValueError(f"hubert-units: runs must be at most {LONGEST_RUN} units, got {float(self.runs.max()):g}")

    def sound(self, units: Sequence[int], *, deduplicated: bool, decoder: MelDecoder | None = None) -> np.ndarray:
        """Units to sound, float32 [time] at 16 kHz; `deduplicated` ones last as long as their mean run."""
        row = torch.tensor(list(units), dtype=torch.long)
        if deduplicated:
            row = row.repeat_interleave(self.runs[row].round().long().clamp_min(1))
        plain = self.mels[row].reshape(-1, BANDS)
        return mel_to_sound(plain) if decoder is None else decoder.sound(row, plain)


class FittedUnits:
    """Centroids, float32 [units, width], of the sounds' features, and what each stands for in these sounds.

    Of many hours of sound a part is read, drawn with `seed`: as much as k-means looks at. `sounds` is `None` where a
    unit does not last whole frames of 10 ms.

    Args:
        values: sounds, as `read_audio` reads them, of any length. encoder, layer, pool: as of `features`.
        units: number of centroids, at least 2. seed: of the draw and of k-means.
        vocoder: that will speak them, of whose frames a decoder learns.
        texts: what each sound says, where a projection is learned first; `None` for one that is not known.
        spelling_steps: of that training, 0 for none.

    Raises:
        ValueError: if there is too little sound, or it cannot be read.
    """

    def __init__(
        self,
        values: Sequence[Any],
        encoder: SpeechEncoder,
        layer: int,
        pool: int,
        units: int,
        seed: int,
        vocoder: MelVocoder | None = None,
        texts: Sequence[str | None] | None = None,
        spelling_steps: int = 0,
    ) -> None:
        samples = encoder.stride * pool
        vectors: list[Tensor] = []
        frames: list[Tensor] = []
        self.vocoder, self.goals = vocoder, frames if vocoder is None else []
        order, total = np.random.default_rng(seed).permutation(len(values)).tolist(), 0
        said = [texts[number] for number in order] if texts is not None else []
        # For a projection features are kept whole, `pool` to a unit: as many of them, and so no more memory.
        enough = ENOUGH // pool if spelling_steps else ENOUGH
        with run_bar("sounds of which units are made") as advance:
            advance(0, len(order))
            while order and total < enough:
                waves = [read_sound(values[number]) for number in order[: encoder.batch]]
                order = order[encoder.batch :]
                found = features(waves, encoder, layer, pool)
                counts = [len(row) // pool for row in found]
                vectors += found if spelling_steps else [pooled(row, pool) for row in found]
                frames += [unit_frames(wave, count, samples) for wave, count in zip(waves, counts)]
                if vocoder is not None:
                    self.goals += [unit_frames(wave, count, samples, vocoder) for wave, count in zip(waves, counts)]
                total += sum(counts)
                needed = round(len(vectors) * max(1.0, enough / total))
                advance(len(vectors), min(len(values), needed))
        if total < units:
            raise ValueError(
                f"hubert-units: {total} vectors are too few for units={units}: at least {units} "
                f"({units * samples / SAMPLING_RATE:.0f} s of sound) are needed, or the option codebook"
            )
        self.projection: SpellingProjection | None = None
        if spelling_steps:
            rate = SAMPLING_RATE / samples
            learned = fit_spelling_projection(
                vectors, said[: len(vectors)], pool, rate, steps=spelling_steps, seed=seed
            )
            vectors = [learned.units(row) for row in vectors]
            self.projection = learned
        everything = torch.cat(vectors)
        self.centroids = fit_centroids(everything, units, seed)
        ids = nearest(everything, self.centroids)
        self.rows = ids.split([len(v) for v in vectors])
        self.sounds = None
        if samples % HOP == 0:
            runs = [row.unique_consecutive(return_counts=True) for row in self.rows]
            lengths = torch.cat([counts for _, counts in runs])[:, None].float()
            self.sounds = UnitSounds(
                mels=means(torch.cat(frames).reshape(total, -1), ids, units).reshape(units, -1, BANDS),
                runs=means(lengths, torch.cat([first for first, _ in runs]), units)[:, 0],
            )

    def decoder(self, steps: int, width: int, seed: int) -> MelDecoder:
        """Trained on these sounds."""
        if self.sounds is None:
            raise ValueError("codec.options: refine_steps has no effect: a unit does not last whole frames of 10 ms")
        return unit_decoder(self.rows, self.goals, self.sounds, steps, width, seed, vocoder=self.vocoder)


def unit_decoder(
    rows: Sequence[Tensor],
    frames: Sequence[Tensor],
    sounds: UnitSounds,
    steps: int,
    width: int,
    seed: int,
    progress: Callable[[int, int, float], None] | None = None,
    vocoder: MelVocoder | None = None,
) -> MelDecoder:
    """Trained on units, long [T] each, and the log-mel frames of their sounds; see `fit_mel_decoder`."""
    units, each, _ = sounds.mels.shape
    sizes = MelDecoderConfig(units=units, frames=each, width=width)
    mels = sounds.mels.flatten(1)
    return fit_mel_decoder(rows, frames, mels, sizes, steps=steps, seed=seed, progress=progress, vocoder=vocoder)


def unit_frames(wave: np.ndarray, units: int, samples: int, vocoder: MelVocoder | None = None) -> Tensor:
    """Log-mel frames of a wave, of the vocoder's kind if there is one, as many as `units` of so many samples last; none
    if these are not whole frames."""
    count = units * (samples // HOP) if samples % HOP == 0 else 0
    level = normalise_loudness(torch.from_numpy(wave))
    if vocoder is not None:
        return vocoder.frames(level, count)
    return log_mel(torch.nn.functional.pad(level, (0, samples)))[:count]
