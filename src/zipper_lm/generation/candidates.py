"""Several samples of one segment: what the model gives each, and which of them goes on (best of n).

A sample's score is the sum of the log-probabilities of what was written, EOS included where it ended with it, under the
model's own distribution at temperature 1, whatever settings it was drawn with: the probability that the model gives to
just this segment. A judge may choose instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from zipper_lm.codecs.codec import can_decode
from zipper_lm.data.collation import IGNORED
from zipper_lm.data.document import Document, Segment

if TYPE_CHECKING:
    from zipper_lm.data.processor import ZipperProcessor

Choose: TypeAlias = Callable[[Sequence[Document], Sequence[Sequence[Segment]]], Sequence[int]]
"""Of documents, and the candidates for the next segment of each: the number of the one that goes on, for each."""


@dataclass(frozen=True)
class Written:
    """One sample: content ids, and whether EOS came after them."""

    ids: list[int]
    ended: bool

    @classmethod
    def until(cls, eos: int, row: list[int], offset: int = 0) -> Written:
        """From what `generate()` wrote, whose ids count from `offset`: EOS and what comes after it is left out."""
        ended = eos in row
        return cls([i - offset for i in (row[: row.index(eos)] if ended else row)], ended)


def candidates_of(name: str, rows: Sequence[Sequence[Written]]) -> list[list[Segment]]:
    """Samples as segments of a modality."""
    return [[Segment(name, ids=sample.ids) for sample in row] for row in rows]


def samples_of(settings: GenerationConfig | None) -> int:
    """How many candidates are asked for."""
    return 1 if settings is None else settings.num_return_sequences or 1


def wants_scores(settings: GenerationConfig | None) -> bool:
    """Whether written segments get log-probabilities."""
    return settings is not None and (bool(settings.output_scores) or samples_of(settings) > 1)


def logprobs_at(logits: Tensor, labels: Tensor) -> list[list[float]]:
    """Natural logarithms of the probabilities of labels, row by row, where there are any.

    Args:
        logits: ``[batch, time, vocab]``. labels: int64 ``[batch, time - 1]``, the next tokens; `IGNORED` elsewhere.
    """
    counts = labels != IGNORED
    values = -F.cross_entropy(logits[:, :-1][counts].float(), labels[counts], reduction="none")
    return [part.tolist() for part in values.split(counts.sum(1).tolist())]


def pick(
    documents: Sequence[Document],
    candidates: Sequence[Sequence[Segment]],
    choose: Choose | None,
    processor: ZipperProcessor | None,
) -> list[Segment]:
    """The candidate that goes on for each document, with all of them beside it where there are several.

    Args:
        documents: what came before. candidates: the same number for each, with log-probabilities where there are
            several. choose: which one; `None`: the one with the highest score. processor: its codecs decode candidates
            before `choose` is asked.

    Raises:
        ValueError: if `choose` answers with anything but a candidate's number for each document.
    """
    if len(candidates[0]) == 1:
        return [row[0] for row in candidates]
    if choose is None:
        numbers = [max(range(len(row)), key=lambda i, row=row: row[i].score) for row in candidates]  # type: ignore[misc]
    else:
        decode(processor, [segment for row in candidates for segment in row])
        numbers = [int(number) for number in choose(documents, candidates)]
    if len(numbers) != len(documents) or any(not 0 <= n < len(row) for n, row in zip(numbers, candidates)):
        raise ValueError(
            f"choose: {len(documents)} documents with {len(candidates[0])} candidates each, but it chose {numbers}"
        )
    return [replace(row[n], candidates=list(row)) for n, row in zip(numbers, candidates)]


def decode(processor: ZipperProcessor | None, segments: Sequence[Segment]) -> None:
    """Give written segments, and the candidates beside them, their raw values, where a codec can make any."""
    if processor is None:
        return
    alone = [c for s in segments for c in (s.candidates or [s]) if c.value is None]
    for name, codec in processor.codecs.items():
        new = [s for s in alone if s.modality == name]
        if new and can_decode(codec):  # else the ids are what there is
            for segment, value in zip(new, processor.decode(name, [s.ids or [] for s in new])):
                segment.value = value
    for segment in segments:
        if segment.candidates and segment.value is None:
            segment.value = next(c.value for c in segment.candidates if c.ids == segment.ids)


def decode_written(processor: ZipperProcessor | None, given: Sequence[Document], written: Sequence[Document]) -> None:
    """`decode` what was written behind what was given."""
    decode(processor, [s for d, old in zip(written, given) for s in d.segments[len(old) :]])
