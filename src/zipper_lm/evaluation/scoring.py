"""Scoring a model on a task by generation: word error rate of what it wrote, or of what a judge heard it say.

A sequence of symbols, such as a protein, is compared with the row's own, token by token: its words are its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from zipper_lm.codecs.audio import read_sound
from zipper_lm.codecs.codec import Codec, looked_up
from zipper_lm.codecs.sequence import SequenceCodec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.tasks import parse_task
from zipper_lm.evaluation.best_of import Heard, sampled
from zipper_lm.evaluation.classifier import PictureClassifier
from zipper_lm.evaluation.judges import Judge, check_writes, suits, transcribe
from zipper_lm.evaluation.word_error_rate import (
    PLAIN,
    Normaliser,
    bootstrap_interval,
    normalise,
    normaliser_of,
    word_error_rate,
)
from zipper_lm.generation.candidates import decode
from zipper_lm.utils.processes import from_main, shared
from zipper_lm.utils.randomness import draws_of, new_seed

if TYPE_CHECKING:
    from zipper_lm.generation.writer import Writer

BATCH = 32
"""Rows that are written, or heard, together."""

SHORT_NAMES = {"asr": "speech->text", "tts": "text->speech"}
"""Names that the field knows, for task templates."""

BEST_BY = ("score", "judge", "reading")
"""What may choose among samples."""


@dataclass
class Score:
    """What one task scored.

    Attributes:
        task: the template. wer, cer: per cent over all rows; both are the token error rate of a sequence of symbols.
        interval: 95 % bootstrap interval of the WER.
        references, hypotheses: what should have been and what was written, or heard or seen by the judge; of a sequence
            of symbols, its ids.
        values: the raw values that were generated, such as waveforms or pictures.
        normaliser: by which texts were compared (`word_error_rate.normaliser_of`).
    """

    task: str
    wer: float
    cer: float
    interval: tuple[float, float]
    references: list[str] = field(repr=False)
    hypotheses: list[str] = field(repr=False)
    values: list[Any] = field(repr=False)
    normaliser: str = PLAIN

    @property
    def exact(self) -> float:
        """Per cent of the rows without a single error: the accuracy, where a text is a label."""
        clean = normaliser_of(self.normaliser)
        right = [clean(r) == clean(h) for r, h in zip(self.references, self.hypotheses)]
        return 100 * float(np.mean(right))

    def summary(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        low, high = (round(x, 2) for x in self.interval)
        return {
            "task": self.task,
            "wer": round(self.wer, 2),
            "cer": round(self.cer, 2),
            "wer_95": [low, high],
            "exact": round(self.exact, 2),
            "utterances": len(self.references),
            **({"normaliser": self.normaliser} if self.normaliser != PLAIN else {}),
        }


def score_task(
    model: Writer,
    rows: Sequence[Mapping[str, Any]],
    task: str,
    *,
    judge: Judge | None = None,
    settings: Mapping[str, Any] | None = None,
    best_of: int = 1,
    best_by: str = "score",
    normaliser: str = PLAIN,
    batch_size: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Generate a task's last segment for every row and compare with the row's text, or with its own sequence. Several
    processes share the batches: all of them call this, and each gets the score of all rows.

    Args:
        model: a model with a processor.
        rows: each with the task's given modalities and ``"text"``, or the last one if it is a sequence of symbols; raw
            values or `Segment`s with ids.
        task: ``"asr"``, ``"tts"`` or a template such as ``"speech->text->speech"``.
        judge: says what generated sounds or pictures show; needed if the task ends in either.
        settings: generation settings per modality; `None`: those kept beside the model.
        best_of: samples of what the task ends in, of which one counts. best_by: ``"score"``, the one that the model
            gives the highest probability; ``"judge"``, the one that the judge hears best (see `best_of.Heard`); or
            ``"reading"``, the one that the model itself reads best (see `generation/read_back.py`).
        normaliser: by which texts are compared (`word_error_rate.normaliser_of`).
        batch_size: documents written together.
        progress: called with (rows done, rows in all).

    Raises:
        ValueError: without rows, for a row without a modality of the task or what to compare with, or without a judge
            where one is needed; for another `best_by`; for a judge whose letters are not those of the texts.
    """
    if best_by not in BEST_BY:
        raise ValueError(f"best_by must be one of {list(BEST_BY)}, got {best_by!r}")
    clean = normaliser_of(normaliser)
    template = SHORT_NAMES.get(task, task)
    parsed = parse_task(template, model.names)
    ends_in = parsed.targets[-1]
    if model.processor is None or ends_in not in model.processor.codecs:
        raise ValueError(f"task {template!r}: the model has no codec for {ends_in!r}, so what it writes stays ids")
    codec = model.processor.codecs[ends_in]
    by_token = counts_tokens(ends_in, codec)
    if by_token:
        normaliser, clean = PLAIN, normalise
    if by_token or ends_in == "text":
        judge = None
    elif judge is None:
        raise ValueError(f"task {template!r} ends in {ends_in}: a judge must say what it is")
    elif not suits(judge, codec):
        raise ValueError(
            f"task {template!r}: a {type(judge).__name__} cannot judge what the codec of {ends_in!r} makes"
        )
    if not rows:
        raise ValueError(f"task {template!r}: no rows to score")
    compared = ends_in if by_token else "text"
    for number, row in enumerate(rows):
        if missing := [m for m in (*parsed.given, compared) if row.get(m) is None]:
            raise ValueError(f"task {template!r}: row {number} has no {missing}; it has {sorted(row)}")
    references = [_reference(row, ends_in, codec) for row in rows]
    for number, reference in enumerate(references):
        if not _is_worded(reference, clean):
            raise ValueError(f"task {template!r}: {compared} of row {number} holds nothing to compare: {reference!r}")
    if judge is not None:
        check_writes(judge, references)
    settings = sampled(
        model.generation_settings if settings is None else settings,
        [ends_in],
        best_of,
        None if best_by == "judge" else best_by,
    )
    choose = Heard(model, judge, clean) if judge is not None and best_by == "judge" else None
    order = sorted(range(len(rows)), key=lambda i: len(references[i]))  # like lengths are written together
    batches, seed = in_parts(order, batch_size), from_main(new_seed())

    def write(number: int) -> list[tuple[Segment, str]]:
        """What is written in a batch, and what it says."""
        documents = [Document([_given(rows[i], m) for m in parsed.given]) for i in batches[number]]
        with draws_of(seed, number):
            answers = model.generate(documents, list(parsed.targets), settings=settings, decode=False, choose=choose)
        segments = [replace(document[-1], candidates=None) for document in answers]
        decode(model.processor, segments)  # and no candidate that does not count
        if by_token:
            return [(segment, _spelled(segment.ids or [])) for segment in segments]
        said = [segment.value for segment in segments]
        return list(zip(segments, said if judge is None else transcribe(judge, said, clean)))

    values, heard = [None] * len(rows), [""] * len(rows)
    done = 0
    for batch, written in zip(batches, shared(range(len(batches)), write), strict=True):
        for i, (segment, said) in zip(batch, written, strict=True):
            values[i], heard[i] = segment.value, said
        done += len(batch)
        if progress is not None:
            progress(done, len(rows))
    rates = word_error_rate(references, heard, clean)
    cer = rates.wer if by_token else rates.cer
    interval = bootstrap_interval(references, heard, clean=clean)
    return Score(template, rates.wer, cer, interval, references, heard, values, normaliser)


def heard_again(score: Score, judge: Judge) -> dict[str, float]:
    """WER and CER in per cent of the sounds of a score, as another judge hears them. Several processes share them."""
    clean = normaliser_of(score.normaliser)

    def hear(part: Sequence[int]) -> list[str]:
        return transcribe(judge, [score.values[i] for i in part], clean)

    heard = [text for part in shared(in_parts(range(len(score.values)), BATCH), hear) for text in part]
    rates = word_error_rate(score.references, heard, clean)
    return {"wer": round(rates.wer, 2), "cer": round(rates.cer, 2)}


def in_parts(order: Sequence[int], most: int) -> list[Sequence[int]]:
    """Cut into as few parts of at most so many as can be, of like sizes: processes that take turns do as much."""
    count = -(-len(order) // most)
    ends = [len(order) * part // count for part in range(count + 1)]
    return [order[start:end] for start, end in pairwise(ends)]


def counts_tokens(modality: str, codec: Codec | None) -> bool:
    """Whether what is written in a modality is compared with the row's own, token by token, and needs no judge:
    sequences of symbols, and tokenizers of anything but the modality ``"text"``, which is compared by words."""
    return isinstance(codec, SequenceCodec) or (modality != "text" and isinstance(codec, TextCodec))


def yardsticks(
    model: Writer,
    rows: Sequence[Mapping[str, Any]],
    judge: Judge,
    modality: str = "speech",
    normaliser: str = PLAIN,
) -> dict[str, float]:
    """WER in per cent of the same judge on the originals (``judge_wer_on_originals``), on what the codec alone makes of
    them (``oracle_wer``), and, where it has a trained decoder, would make without (``look_up_wer``); empty if there are
    none. Several processes share the work."""
    if any(row.get(modality) is None for row in rows):
        return {}
    assert model.processor is not None
    codec, clean = model.processor.codecs[modality], normaliser_of(normaliser)
    ways = [way for way in (codec, looked_up(codec)) if way is not None]

    def hear(part: Sequence[int]) -> list[tuple[str, ...]]:
        originals = [rows[i][modality] for i in part]
        if not isinstance(judge, PictureClassifier):
            originals = [read_sound(value) for value in originals]
        ids = codec.encode(originals)
        said = [originals, *(way.decode(ids) for way in ways)]
        return list(zip(*(transcribe(judge, values, clean) for values in said), strict=True))

    heard = [each for part in shared(in_parts(range(len(rows)), BATCH), hear) for each in part]
    texts = [_text(row) for row in rows]
    rates = [round(word_error_rate(texts, list(each), clean).wer, 2) for each in zip(*heard, strict=True)]
    return dict(zip(("judge_wer_on_originals", "oracle_wer", "look_up_wer"), rates))


def _given(row: Mapping[str, Any], modality: str) -> Any:
    value = row[modality]
    return value if hasattr(value, "modality") else (modality, value)


def _ids(value: Any, codec: Codec) -> Sequence[int]:
    """The ids of a row's value, which may be a `Segment` that has them."""
    if isinstance(value, Segment):
        if value.ids is not None:
            return value.ids
        value = value.value
    return codec.encode([value])[0]


def _spelled(ids: Sequence[int]) -> str:
    """Ids as words, so that errors in words are errors in tokens, whatever their symbols look like."""
    return " ".join(str(i) for i in ids)


def has_words(row: Mapping[str, Any], normaliser: str = PLAIN) -> bool:
    """Whether errors in a row's text can be counted."""
    return _is_worded(_text(row), normaliser_of(normaliser))


def _is_worded(text: Any, clean: Normaliser) -> bool:
    return isinstance(text, str) and bool(clean(text))


def scorable(
    rows: Sequence[Mapping[str, Any]], modality: str, codec: Codec | None, normaliser: str = PLAIN
) -> list[Mapping[str, Any]]:
    """The rows with which something written can be compared: silence has no words to get wrong.

    Args:
        rows: as of `score_task`; one without the column to compare with stays, to be named there.
        modality: what is written. codec: its. normaliser: as of `score_task`.
    """
    if counts_tokens(modality, codec):
        return [row for row in rows if row.get(modality) is None or _reference(row, modality, codec)]
    return [row for row in rows if row.get("text") is None or has_words(row, normaliser)]


def told_unscored(count: int, rows: str) -> str:
    """That so many rows (``"validation rows"``) are not `scorable`."""
    return f"{count} {rows} have no words in their text, so they are not scored"


def _reference(row: Mapping[str, Any], modality: str, codec: Codec | None) -> str:
    """What should be written, or said: the row's text, or the ids of its own sequence."""
    if codec is not None and counts_tokens(modality, codec):
        return _spelled(_ids(row[modality], codec))
    return _text(row)


def _text(row: Mapping[str, Any]) -> str:
    value = row["text"]
    return value.value if hasattr(value, "modality") else value
