"""Guided attention: where two modalities run in step, as text and its sound do, looking elsewhere costs.

The loss is that of Tachibana et al. 2018 (arXiv 1710.08969, section 4.1), there for one attention of a speech
synthesiser, here for every head of the zip layers of a directed pair: attention from place n of N to place t of T costs
``1 - exp(-(n/N - t/T)^2 / (2 g^2))``. Attention is computed a second time for it, as probabilities, which the backward
pass keeps: memory grows with the product of both lengths.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zipper_lm.data.collation import Batch
from zipper_lm.data.tasks import Task
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import visible
from zipper_lm.fusion.zips import View, ZipLayer

WIDTH = 0.2
"""g, as a share of the segment (section 4.1)."""

Pair = tuple[str, str]
"""Reader and source."""


def guided_pairs(weights: Mapping[str, float], tasks: Mapping[str, Task]) -> dict[Pair, float]:
    """Which pairs of towers the tasks' weights are for: the reader is what a task writes, the source what it is given.

    Args:
        weights: by template. tasks: the recipe's, by template.

    Raises:
        ValueError: for a template that is no task of the recipe, or does not go from one modality to another.
    """
    pairs = {}
    for template, weight in weights.items():
        if template not in tasks:
            raise ValueError(f"training.guided_attention names {template!r}, but the tasks are {list(tasks)}")
        if len(set(tasks[template].modalities)) != 2 or len(tasks[template].modalities) != 2:
            raise ValueError(f"training.guided_attention: {template!r} does not go from one modality to one other")
        source, reader = tasks[template].modalities
        pairs[reader, source] = weight
    return pairs


def off_diagonal(attention: Tensor, view: View) -> Tensor | None:
    """Summed cost of attention that leaves the diagonal, in [0, 1] for each query that counts; a scalar.

    Rows count in which all queries that see something see the same tokens: one segment read through another, as a
    whole. In longer documents a query sees several segments, and which one it should be in step with is not said.

    Args:
        attention: probabilities ``[B, H, Q, M]``. view: who could look where.

    Returns:
        None if no row counts.
    """
    seen, source, counted = _in_step(view, attention.shape[2])
    if not counted.any():
        return None
    apart = _progress(seen)[:, :, None] - _progress(source)[:, None, :]
    cost = 1 - torch.exp(-(apart**2) / (2 * WIDTH**2))
    return (attention.float() * cost[:, None]).sum(-1).mean(1)[counted].sum()


def _in_step(view: View, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which queries see something and which tokens are seen, and the queries that count; bool ``[B, Q]``, ``[B, M]``,
    ``[B, Q]``."""
    seen = view.seen[..., 0].expand(-1, queries)
    sees = view.allowed[:, 0].expand(-1, queries, -1) & seen[..., None]
    source = sees.any(1)
    whole = ((sees == source[:, None]) | ~seen[..., None]).all(2).all(1)
    return seen, source, seen & whole[:, None]


def query_counts(batch: Batch, pairs: Collection[Pair]) -> dict[Pair, Tensor]:
    """How many queries of a batch count, int64 scalars by pair."""
    counts = dict.fromkeys(pairs, torch.tensor(0))
    for reader, source in pairs:
        if reader in batch and source in batch:
            segments = batch[reader]["segments"]
            view = View.of(visible(segments, batch[source]["segments"]))
            counts[reader, source] = _in_step(view, segments.shape[1])[2].sum()
    return counts


def _progress(present: Tensor) -> Tensor:
    """How far each token that is present has come, 0 for the first to 1 for the last; ``[B, T]`` as given."""
    count = present.sum(1, keepdim=True)
    return (present.cumsum(1) - 1) / (count - 1).clamp_min(1)


@contextmanager
def watched(
    model: ZippedTowers, weights: Mapping[Pair, float], counts: Mapping[Pair, Tensor]
) -> Iterator[list[Tensor]]:
    """What passes through the model inside is held to the diagonal.

    Args:
        model: the model. weights: of pairs. counts: by pair, the number of queries that costs are divided by.

    Yields:
        A list that fills with the weighted costs, one for each zip layer that acts; their sum is the loss.
    """
    costs: list[Tensor] = []
    with ExitStack() as hooks:
        for (reader, source), weight in weights.items():
            layers = len(model.layer_pairs.get((reader, source), ()))
            for k in range(layers):
                watch = _Watch(costs, weight / layers, counts[reader, source])
                hooks.callback(model.zip_layer(reader, source, k).register_forward_hook(watch).remove)
        yield costs


class _Watch:
    """A forward hook of a zip layer, which writes its weighted cost down."""

    def __init__(self, costs: list[Tensor], weight: float, count: Tensor) -> None:
        self.costs, self.weight, self.count = costs, weight, count

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], update: Tensor) -> None:
        assert isinstance(layer, ZipLayer)
        if (cost := off_diagonal(layer.attention_map(*args), args[3])) is not None:
            self.costs.append(self.weight * (cost / self.count.to(cost.device)))
