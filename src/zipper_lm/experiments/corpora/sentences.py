"""sentences: lines of text, read by many synthetic voices (espeak-ng, flite); speakers of one split are in no other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from zipper_lm.codecs.audio import write_audio
from zipper_lm.evaluation.word_error_rate import normalise
from zipper_lm.experiments.corpora import flite as flite_program
from zipper_lm.experiments.corpora.flite import FliteVoice
from zipper_lm.experiments.corpora.voices import (
    CLEAR_LANGUAGES,
    CLEAR_VARIANTS,
    LANGUAGES,
    VARIANTS,
    Voice,
    espeak,
    synthesise,
    voices,
)
from zipper_lm.experiments.corpora.writing import write_corpus
from zipper_lm.utils.files import check_apart

SPEAKERS = {"train": 0.55, "validation": 0.1, "test": 0.1, "judge": 0.25}
"""Share of the voice variants that each split has for itself."""
FLITE = {"train": ("slt", "awb", "kal16"), "test": ("rms",)}
"""Flite's speakers, where they are asked for: they read every other sentence of their split."""
VOICES = 100
"""Of espeak-ng in each split, unless something else is said."""
SEED = 0
_PAUSES = re.compile(r"[,;:.?!()\"]+|--+")


def write_sentences(
    folder: str | Path,
    source: str | Path,
    *,
    train: int = 10_000,
    shortest: int = 1,
    longest: int = 200,
    flite: bool = False,
    voices: int = VOICES,
    clear: bool = False,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write rows ``{"speech": file, "text": sentence, "speaker": voice}`` in splits train, validation, test and judge,
    and, for a text tower, whole lines as ``{"text": line}`` in ``text/train.jsonl`` and ``text/validation.jsonl``.

    Args:
        folder: to be made.
        source: folder with ``train.txt``, ``validation.txt`` and ``test.txt``, a sentence a line. A fifth of the lines
            of ``train.txt`` are the judge's, and nobody else's.
        train: most sentences for training; for the judge, a quarter of it.
        shortest: fewest characters of a sentence.
        longest: most characters of a sentence; longer lines are cut into phrases, at their punctuation.
        flite: half of the sentences of train and test are read by flite's voices, see `FLITE`.
        voices: of espeak-ng in each split: accents and variants with a pitch, a range and a speed.
        clear: leave out accents and variants that a public recogniser does not understand, see `CLEAR_VARIANTS`.
        overwrite: replace what is there.

    Returns:
        Rows in each split.

    Raises:
        ValueError: if a file is missing or holds no such line, `voices` is below 1, `folder` would replace `source`, or
            the program of `flite` is missing; and as `write_corpus`.
        ImportError: without `espeakng-loader` (the extra ``zipper-lm[demo]``).
    """
    check_apart(folder, {"--source": source})
    if voices < 1:
        raise ValueError(f"--voices must be at least 1, got {voices}")
    if shortest > longest:
        raise ValueError(f"--shortest {shortest}: must be at most --longest, {longest}")
    if flite:
        flite_program.check_flite()
    espeak()  # or its absence is found by the first worker
    lines = {name: _lines(Path(source) / f"{name}.txt") for name in ("train", "validation", "test")}
    fifth = max(1, len(lines["train"]) // 5)
    lines |= {"judge": lines["train"][:fifth], "train": lines["train"][fifth:]}
    sentences: dict[str, list[str]] = {}
    taken: set[str] = set()
    for name, most in (("validation", None), ("test", None), ("judge", max(1, train // 4)), ("train", train)):
        found = dict.fromkeys(phrase for line in lines[name] for phrase in _phrases(line, shortest, longest))
        sentences[name] = [phrase for phrase in found if phrase not in taken][:most]
        taken |= set(sentences[name])
    if empty := [name for name, found in sentences.items() if not found]:
        raise ValueError(f"{source}: no sentences of {shortest} to {longest} characters for {empty}")
    spoken = {
        name: {p for line in lines[name] for p in _phrases(line, shortest, longest)} for name in ("validation", "test")
    }
    texts = {
        f"text/{name}": [
            {"text": text}
            for line in lines[name]
            if can_be_said(text := normalise(line))
            and not held_out.intersection([text, *_phrases(line, shortest, longest)])
        ]
        for name, held_out in (("train", spoken["validation"] | spoken["test"]), ("validation", spoken["test"]))
    }
    pool = ProcessPoolExecutor(mp_context=get_context("spawn"))  # espeak-ng keeps one state a process
    try:
        aloud = _read_aloud(sentences, flite, voices, clear, pool)
        return write_corpus(folder, aloud, "speech", ".flac", write_audio, texts, overwrite=overwrite)
    finally:
        pool.shutdown(cancel_futures=True)  # after a fault the sentences that are left are not waited for


def _lines(file: Path) -> list[str]:
    """Each once."""
    if not file.is_file():
        raise ValueError(f"{file.parent}: no {file.name} there")
    return list(dict.fromkeys(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()))


def _phrases(line: str, shortest: int, longest: int) -> list[str]:
    """The line, or what is between its punctuation if it is longer: two words or more that can be said."""
    whole = normalise(line)
    parts = [whole] if len(whole) <= longest else [p for p in map(normalise, _PAUSES.split(line)) if " " in p]
    return [part for part in parts if can_be_said(part) and shortest <= len(part) <= longest]


def can_be_said(text: str) -> bool:
    """Letters alone: how a number is read, its digits do not say."""
    return bool(text) and text.isascii() and not any(c.isdigit() for c in text)


def _read_aloud(
    lines: Mapping[str, list[str]], flite: bool, count: int, clear: bool, pool: Executor
) -> dict[str, Iterator[tuple[Any, dict[str, Any]]]]:
    """By split, sounds with the other fields of their rows."""
    variants, languages = (CLEAR_VARIANTS, CLEAR_LANGUAGES) if clear else (VARIANTS, LANGUAGES)
    order = np.random.default_rng(SEED).permutation(len(variants))
    ends = np.cumsum([round(share * len(variants)) for share in list(SPEAKERS.values())[:-1]])
    owned = dict(zip(SPEAKERS, np.split(order, ends)))
    return {
        name: _spoken(
            texts,
            voices(count, SEED, tuple(variants[i] for i in owned[name]), languages),
            [FliteVoice(speaker=speaker) for speaker in FLITE.get(name, ())] if flite else [],
            pool,
        )
        for name, texts in lines.items()
    }


def _spoken(
    texts: list[str], speakers: list[Voice], flites: list[FliteVoice], pool: Executor
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    who = _turns(len(texts), speakers, flites)
    for wave, text, voice in zip(pool.map(_say, texts, who, range(len(texts)), chunksize=16), texts, who):
        yield wave, {"text": text, "speaker": voice.name}


def _turns(count: int, speakers: list[Voice], flites: list[FliteVoice]) -> list[Voice | FliteVoice]:
    """Who reads each of some sentences: flite's voices, if there are any, every other one, and all in turn."""
    if not flites:
        return [speakers[i % len(speakers)] for i in range(count)]
    return [flites[i // 2 % len(flites)] if i % 2 else speakers[i // 2 % len(speakers)] for i in range(count)]


def _say(text: str, voice: Voice | FliteVoice, seed: int) -> np.ndarray:
    if isinstance(voice, FliteVoice):
        return flite_program.synthesise(text, voice, seed)
    return synthesise(text, voice, seed)
