"""Word and character error rates over a whole test set, with counts and a bootstrap interval."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise

import jiwer
import numpy as np
from scipy.special import stdtrit

Normaliser = Callable[[str], str]
"""Brings a text to the form in which words are compared. A function, or something else that can be hashed."""

PLAIN, WHISPER_ENGLISH = "plain", "whisper-english"
NORMALISERS = (PLAIN, WHISPER_ENGLISH)
"""What `normaliser_of` knows."""


@dataclass(frozen=True, kw_only=True)
class ErrorRates:
    """Errors of a set of hypotheses.

    Args:
        wer: word error rate, per cent: 100 (S + D + I) / reference words, over all utterances together.
        cer: the same over characters, per cent.
        substitutions: words replaced.
        deletions: words missed.
        insertions: words added.
        words: reference words.
        utterances: number of utterances.
    """

    wer: float
    cer: float
    substitutions: int
    deletions: int
    insertions: int
    words: int
    utterances: int


def normalise(text: str) -> str:
    """Lower case, no punctuation (apostrophes within words stay), single spaces."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    text = "".join(_kept(before, character) for before, character in pairwise(f" {text}"))
    text = re.sub(r"(?<![^\s'])'+|'+(?![^\s'])", " ", text)
    return " ".join(text.split())


def normaliser_of(name: str) -> Normaliser:
    """A normaliser by its name.

    ``"plain"`` is `normalise`. ``"whisper-english"`` is the one by which English recognisers are compared in the field
    (Radford et al. 2022, appendix C), as transformers has it: numbers become digits, contractions and titles are
    written out, fillers such as "um" and what stands in brackets go. Its table of British and American spellings,
    which comes with checkpoints of Whisper and not with transformers, is empty here: "colour" is not "color".

    Raises:
        ValueError: for another name.
    """
    if name not in NORMALISERS:
        raise ValueError(f"normaliser must be one of {list(NORMALISERS)}, got {name!r}")
    return normalise if name == PLAIN else _whisper_english


@cache
def _english() -> Normaliser:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer({})


def _whisper_english(text: str) -> str:
    cleaned = _english()(text)
    return " ".join(word for word in cleaned.split() if any(map(str.isalnum, word)))  # it leaves a full stop alone


def _kept(before: str, character: str) -> str:
    """Letters, the marks upon them (vowel signs of many scripts are marks), and numbers. Joiners of no width, and marks
    upon what is no letter, such as an emoji's, are nothing; all else, spaces of no width too, parts words."""
    kind = unicodedata.category(character)
    if kind[0] in "LN" or character == "'":
        return character
    if kind == "Me" or "\ufe00" <= character <= "\ufe0f":  # how an emoji looks
        return ""
    if kind[0] == "M":
        upon = unicodedata.category(before)
        return character if upon[0] in "LNM" or upon == "Cf" else ""
    return "" if kind == "Cf" and character != "\u200b" else " "


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str], clean: Normaliser = normalise) -> ErrorRates:
    """Corpus-level error rates of texts normalised by `clean`; an empty hypothesis counts as deletions.

    Raises:
        ValueError: no references, lengths differ, or a reference holds no words.
    """
    clean_references, clean_hypotheses = _checked(references, hypotheses, clean)
    words = jiwer.process_words(clean_references, clean_hypotheses)
    return ErrorRates(
        wer=100 * words.wer,
        cer=100 * jiwer.process_characters(clean_references, clean_hypotheses).cer,
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        words=words.hits + words.substitutions + words.deletions,
        utterances=len(clean_references),
    )


def bootstrap_interval(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
    clean: Normaliser = normalise,
) -> tuple[float, float]:
    """Percentile interval of the WER in per cent, by drawing utterances with replacement (Bisani & Ney 2004).

    Args:
        references: what was said.
        hypotheses: what was heard.
        level: share of the draws inside the interval, between 0 and 1.
        samples: number of draws.
        seed: the same seed gives the same interval.
        clean: normalises both.

    Raises:
        ValueError: as `word_error_rate`; or `level` or `samples` out of range.
    """
    _check_sampling(level, samples)
    errors, words = _counts(references, hypotheses, clean)
    draws = np.random.default_rng(seed).integers(len(words), size=(samples, len(words)))
    rates = 100 * errors[draws].sum(1) / words[draws].sum(1)
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_interval(
    references: Sequence[str],
    ours: Sequence[Sequence[str]],
    theirs: Sequence[Sequence[str]],
    *,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
    clean: Normaliser = normalise,
) -> tuple[float, float, float]:
    """WER of `ours` minus that of `theirs` in points, and its interval over utterances and seeds.

    Of utterances it is the paired bootstrap (Bisani & Ney 2004): they are drawn once for both systems and all their
    seeds, as the same utterance again, from another seed, is no new evidence about utterances. Of seeds it is Student's
    interval of the mean of the seeds' differences: two or three of them, drawn with replacement, would give intervals
    that hold the truth in two cases of three. Both widths add as independent errors do (a little too wide, as what
    differs between seeds has the noise of utterances in it). Of one seed it is utterances alone.

    Args:
        references: what was said.
        ours, theirs: per seed, what two systems made of it; as many seeds of each.
        level, samples, seed, clean: as in `bootstrap_interval`.

    Raises:
        ValueError: as `bootstrap_interval`, or without seeds or with unequal numbers of them.
    """
    _check_sampling(level, samples)
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"ours and theirs need the same number of seeds, at least one; got {len(ours)}, {len(theirs)}")
    counted = [[_counts(references, each, clean) for each in of] for of in (ours, theirs)]
    more = np.stack([a[0] - b[0] for a, b in zip(*counted)])
    words = counted[0][0][1]
    drawn = np.random.default_rng(seed).integers(len(words), size=(samples, len(words)))
    rates = 100 * more.mean(0)[drawn].sum(1) / words[drawn].sum(1)
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    of_seeds = 100 * more.sum(1) / words.sum()
    middle = float(of_seeds.mean())
    beside = 0.0
    if len(of_seeds) > 1:
        beside = float(stdtrit(len(of_seeds) - 1, (1 + level) / 2) * of_seeds.std(ddof=1) / len(of_seeds) ** 0.5)
    return middle, middle - float(np.hypot(middle - low, beside)), middle + float(np.hypot(high - middle, beside))


def _check_sampling(level: float, samples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")


def _counts(references: Sequence[str], hypotheses: Sequence[str], clean: Normaliser) -> tuple[np.ndarray, np.ndarray]:
    """Errors and reference words of each utterance, int64 ``[utterances]``."""
    return _counted(tuple(references), tuple(hypotheses), clean)


@lru_cache(maxsize=256)
def _counted(
    references: tuple[str, ...], hypotheses: tuple[str, ...], clean: Normaliser
) -> tuple[np.ndarray, np.ndarray]:
    """Kept: a report compares each run with many others."""
    each = [jiwer.process_words([r], [h]) for r, h in zip(*_checked(references, hypotheses, clean))]
    errors = np.array([w.substitutions + w.deletions + w.insertions for w in each])
    return errors, np.array([w.hits + w.substitutions + w.deletions for w in each])


def _checked(references: Sequence[str], hypotheses: Sequence[str], clean: Normaliser) -> tuple[list[str], list[str]]:
    """Both normalised. Raises `ValueError` where no rate is defined."""
    if not len(references):
        raise ValueError("references must hold at least one text, got none")
    if len(references) != len(hypotheses):
        raise ValueError(
            f"references and hypotheses must have the same length, got {len(references)} and {len(hypotheses)}"
        )
    said = [clean(text) for text in references]
    for number, text in enumerate(said):
        if not text:
            raise ValueError(f"references[{number}] holds no words: {references[number]!r}")
    return said, [clean(text) for text in hypotheses]
