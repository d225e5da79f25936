"""In which order documents are trained on: those of like length together, drawn anew in each epoch.

The order is a function of (seed, epoch, documents of an optimizer step), whatever the number of processes that share
the step, and of workers. What a document is subjected to depends on (seed, epoch, its number): `TaskMixture` and
`CorruptedDocuments`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Sampler

MEGABATCHES = 50
"""Batches within which documents are sorted by length, at most; fewer where there would be fewer than four such."""


class Lengthy(Protocol):
    """Documents that know their lengths and differ from epoch to epoch."""

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...

    def lengths(self) -> np.ndarray:
        """Tokens of each document in this epoch, int64 [documents]."""


class LikeLengths(Sampler[int]):
    """Documents of like length share a batch: less padding. The order is drawn anew from (seed, epoch).

    Args:
        documents: told the epoch too: accelerate's loaders tell a data set only if their sampler is not wrapped, and
            it is wrapped in a resumed epoch and with several processes.
        batch: documents per optimizer step. seed: of the order.
    """

    def __init__(self, documents: Lengthy, batch: int, seed: int) -> None:
        self.documents, self.batch, self.seed = documents, batch, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw as in this epoch from now on. Accelerate's loaders call it."""
        self.epoch = epoch
        self.documents.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.documents)

    def __iter__(self) -> Iterator[int]:
        state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        return map(int, grouped(self.documents.lengths(), self.batch, generator))


class Evened(Sampler[int]):
    """An order that every process goes through in as many batches: where an epoch ends, some have no document left, and
    read the last one again. It comes as ``~number``, and nothing is learned from it. Accelerate would begin the epoch's
    first documents again, so that which documents are seen depended on the number of processes.

    Args:
        order: of the documents of an epoch; told the epoch.
        together: documents of one batch in all processes. step: those of an optimizer step.
        drop_last: leave out the last step of an epoch if there are too few documents for it.

    Raises:
        ValueError: if that leaves nothing.
    """

    def __init__(self, order: Any, *, together: int, step: int, drop_last: bool = False) -> None:
        self.order, self.together = order, together
        self._kept = len(order) // step * step if drop_last else len(order)
        if not self._kept:
            raise ValueError(
                f"training.arguments: dataloader_drop_last leaves none of {len(order)} documents: a step has {step}"
            )

    def set_epoch(self, epoch: int) -> None:
        """Draw as in this epoch from now on. Accelerate's loaders call it."""
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return self._kept + -self._kept % self.together

    def __iter__(self) -> Iterator[int]:
        number = 0
        for number in islice(self.order, self._kept):
            yield number
        yield from [~number] * (len(self) - self._kept)


def grouped(lengths: np.ndarray, batch: int, generator: torch.Generator) -> np.ndarray:
    """The order that transformers' `get_length_grouped_indices` gives, which takes seconds for a million documents:
    drawn, sorted from long to short within every few batches, and the longest of all first, so that what does not fit
    into memory is seen at once.

    Args:
        lengths: of each document, int64 [documents]. batch: documents in one. generator: of the draw.

    Returns:
        Their numbers, int64 [documents].
    """
    drawn = torch.randperm(len(lengths), generator=generator).numpy()
    size = batch * max(1, min(len(lengths) // (4 * batch), MEGABATCHES))
    even = len(lengths) // size * size
    for part in (drawn[:even].reshape(-1, size), drawn[even:].reshape(1, -1)):
        part[:] = np.take_along_axis(part, np.argsort(-lengths[part], axis=1, kind="stable"), axis=1)
    firsts = np.arange(0, len(drawn), size)
    longest = firsts[np.argmax(lengths[drawn[firsts]])]
    drawn[[0, longest]] = drawn[[longest, 0]]
    return drawn
