"""Which documents share a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from zipper_lm import Document, Segment
from zipper_lm.data.collation import Specials, collate
from zipper_lm.data.mixture import TaskMixture
from zipper_lm.training.corruption import CorruptedDocuments
from zipper_lm.training.order import LikeLengths, grouped

SPECIALS = {"text": Specials(0, 1, 2), "speech": Specials(0, 1, 2)}


class Documents:
    """Documents of given lengths, which are others in another epoch."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.found, self.epoch = lengths, 0

    def __len__(self) -> int:
        return len(self.found)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def lengths(self) -> np.ndarray:
        return self.found + self.epoch * np.arange(len(self.found))


@pytest.mark.parametrize("count", [1, 3, 4, 15, 16, 64, 199, 1000, 1003])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_order_is_that_of_transformers(count: int, batch: int) -> None:
    lengths = np.random.default_rng(count).integers(5, 30, count)
    theirs = get_length_grouped_indices(lengths.tolist(), batch, generator=torch.Generator().manual_seed(3))
    assert grouped(lengths, batch, torch.Generator().manual_seed(3)).tolist() == theirs


def test_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 50, 64)
    sampler = LikeLengths(Documents(lengths), 4, seed=3)
    first = list(sampler)
    assert len(sampler) == 64
    assert sorted(first) == list(range(64))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    spread = np.mean([np.ptp([lengths[i] for i in first[k : k + 4]]) for k in range(0, 64, 4)])
    assert spread < 0.5 * np.mean([np.ptp(lengths[k : k + 4]) for k in range(0, 64, 4)])


def padding(documents: CorruptedDocuments, order: list[int]) -> float:
    empty = tokens = 0
    for start in range(0, len(order), 8):
        for stream in collate([documents[i] for i in order[start : start + 8]], SPECIALS).values():
            empty += int((stream["attention_mask"] == 0).sum())
            tokens += stream["attention_mask"].numel()
    return empty / tokens


def test_batches_are_alike_in_every_epoch() -> None:
    """Lengths were those of the first epoch's draw, and of the longest segment in place of the streams: where a second
    row follows in some documents, batches of later epochs held more padding than sound."""
    draw = np.random.default_rng(0)
    rows = [
        {"speech": Segment("speech", ids=[5] * int(n)), "text": Segment("text", "x", [4] * int(n // 8))}
        for n in draw.integers(20, 400, 512)
    ]
    mixture = TaskMixture(rows, {"speech->text": 1}, interleave=0.5)
    documents = CorruptedDocuments(mixture, SPECIALS, corrupt=0.0, history_dropout=0.0, sizes={}, seed=0)
    sampler = LikeLengths(documents, 8, seed=0)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert padding(documents, list(sampler)) < 0.12


def test_documents_that_do_not_know_their_lengths_are_measured() -> None:
    whole = [Document([Segment("text", ids=[4] * 3), Segment("speech", ids=[4]), Segment("text", ids=[4])])] * 2
    documents = CorruptedDocuments(whole, SPECIALS, corrupt=0.0, history_dropout=0.0, sizes={}, seed=0)  # type: ignore[arg-type]
    assert documents.lengths().tolist() == [8, 8]
