"""Guided attention: where two modalities run in step, as text and its sound do, looking elsewhere costs.

The loss is that of Tachibana et al. 2018 (arXiv 1710.08969, section 4.1), there for one attention of a speech
synthesiser, here for every head of the zip layers of a directed pair: attention from place n of N to place t of T costs
``1 - exp(-(n/N - t/T)^2 / (2 g^2))``. Attention is computed a second time for it, as probabilities, which the backward
pass keeps: memory grows with the product of both lengths.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zipper_lm.data.collation import Batch, batch_on_host
from zipper_lm.fusion.loss import share
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import rows_that_see, visible_between
from zipper_lm.fusion.zips import View, ZipLayer
from zipper_lm.training.beside import Pair, watched_layer
from zipper_lm.utils.host import send

WIDTH = 0.2
"""g, as a share of the segment (section 4.1)."""


class GuidedAttention:
    """The loss of pairs by their weights; see `zipper_lm.training.beside.BesideLoss`."""

    name = "guided_attention"

    def __init__(self, weights: Mapping[Pair, float]) -> None:
        self.weights = weights

    def counts(self, batch: Batch) -> dict[Pair, Tensor]:
        """The queries that count."""
        return query_counts(batch, self.weights)

    def watch(
        self, model: ZippedTowers, batch: Batch, counts: Mapping[Pair, Tensor]
    ) -> AbstractContextManager[list[Tensor]]:
        """See `watched`."""
        return watched(model, batch, self.weights, counts)


def off_diagonal(attention: Tensor, view: View, counted: Tensor) -> Tensor:
    """Summed cost of attention that leaves the diagonal, in [0, 1] for each query that counts; a scalar.

    Documents count in which all queries that see something see the same tokens: one segment read through another, as a
    whole. In longer documents a query sees several segments, and which one it should be in step with is not said.

    Args:
        attention: probabilities ``[B, H, Q, M]``. view: who could look where. counted: int64, the places of the queries
            that count in all ``B * Q``.
    """
    sees = _sees(view, attention.shape[2])
    apart = _read(sees)[:, :, None] - _progress(sees)
    cost = 1 - torch.exp(-(apart**2) / (2 * WIDTH**2))
    return (attention.float() * cost[:, None]).sum(-1).mean(1).flatten().index_select(0, counted).sum()


def _sees(view: View, queries: int) -> Tensor:
    """What each query sees, bool ``[B, Q, M]``."""
    return view.allowed[:, 0].expand(-1, queries, -1) & view.seen.expand(-1, queries, -1)


def _in_step(sees: Tensor) -> Tensor:
    """The queries that count, bool ``[B, Q]``, by what each sees.

    A query sees the beginning of what its document has of the source. So of two in a row that see something, those that
    begin at the same token are of one document, as there may be several in a row.
    """
    first, number, seen = sees.int().argmax(2), sees.sum(2), sees.any(2)
    differ = (first[:, :, None] == first[:, None]) & (number[:, :, None] != number[:, None]) & seen[:, None]
    return seen & ~differ.any(2)


def counted_queries(batch: Batch, pair: Pair) -> Tensor:
    """The queries of a batch that count, bool ``[B, Q]`` on the CPU; empty where a tower is not in it."""
    if not all(name in batch for name in pair):
        return torch.zeros(0, 0, dtype=torch.bool)
    known = batch_on_host(batch)
    return _in_step(visible_between(*(known[name] for name in pair)))


def query_counts(batch: Batch, pairs: Collection[Pair]) -> dict[Pair, Tensor]:
    """How many queries of a batch count, int64 scalars on the CPU by pair."""
    return {pair: counted_queries(batch, pair).sum() for pair in pairs}


def _progress(sees: Tensor) -> Tensor:
    """How far each token that a query sees has come among them, 0 for the first to 1 for the last; ``[B, Q, M]``."""
    return (sees.cumsum(2) - 1) / (sees.sum(2, keepdim=True) - 1).clamp_min(1)


def _read(sees: Tensor) -> Tensor:
    """How far each query has come among those of its document that see something; ``[B, Q]``."""
    first, seen = sees.int().argmax(2), sees.any(2)
    alike = (first[:, :, None] == first[:, None]) & seen[:, None]
    return (alike.tril().sum(2) - 1) / (alike.sum(2) - 1).clamp_min(1)


@contextmanager
def watched(
    model: ZippedTowers, batch: Batch, weights: Mapping[Pair, float], counts: Mapping[Pair, Tensor]
) -> Iterator[list[Tensor]]:
    """Where the model reads a batch inside, it is held to the diagonal.

    Args:
        model: the model. batch: what it reads. weights: of pairs. counts: by pair, the number of queries that costs are
            divided by.

    Yields:
        A list that fills with the weighted costs, one for each zip layer that acts; their sum is the loss.
    """
    costs: list[Tensor] = []
    with ExitStack() as hooks:
        for (reader, source), weight in weights.items():
            layers = len(model.layer_pairs.get((reader, source), ()))
            counted = counted_queries(batch, (reader, source))
            if not counted.any():
                continue
            rows = rows_that_see(batch[reader], batch[source])
            for k in range(layers):
                watch = _Watch(costs, weight / layers, counts[reader, source], counted, rows)
                hooks.callback(watched_layer(model.zip_layer(reader, source, k), watch).remove)
        yield costs


class _Watch:
    """Called of a zip layer's calls; it writes their weighted cost down."""

    def __init__(self, costs: list[Tensor], weight: float, count: Tensor, counted: Tensor, rows: Tensor | None) -> None:
        self.costs, self.weight, self.count, self.counted, self.rows = costs, weight, count, counted, rows

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], update: Tensor | None = None) -> None:
        assert isinstance(layer, ZipLayer)
        if len(args) < 4:  # it remembers
            return
        view = args[3]
        here = self.counted if len(view.seen) == len(self.counted) else self.counted[self.rows]
        (places,) = send([here.flatten().nonzero()[:, 0]], view.seen.device)
        self.costs.append(self.weight * share(off_diagonal(layer.attention_map(*args), view, places), self.count))
