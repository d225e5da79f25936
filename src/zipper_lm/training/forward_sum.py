"""Forward-sum: attention shall be monotonic, along whatever path.

The loss is that of Badlani et al. 2021 (arXiv 2108.10447, section 2.1): the negative log-probability of all monotonic
alignments of two segments together, in which no token of the shorter one is left out; the sum over them is that of CTC.
There it is for the one attention of a speech synthesiser, here for each zip layer of a pair, its heads averaged: each
token of the longer segment, be it of the reader's or of the source's, spreads its attention over the shorter one's.
Scores are computed a second time for it, which the backward pass keeps: memory grows with the product of both lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zipper_lm.data.collation import Batch
from zipper_lm.fusion.loss import share
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import rows_that_see
from zipper_lm.fusion.zips import ZipLayer
from zipper_lm.training.beside import Pair, SegmentPair, padded, segment_pairs, summed_ctc, watched_layer
from zipper_lm.utils.host import send

BLANK = -1.0
"""Log-probability that a token of the longer segment goes with none, before all are normalised (as Badlani et al.)."""
NEVER = -1e4
"""Score of what is padding."""


class ForwardSum:
    """The loss of pairs by their weights; see `zipper_lm.training.beside.BesideLoss`."""

    name = "forward_sum"

    def __init__(self, weights: Mapping[Pair, float]) -> None:
        self.weights: Mapping[Pair, float] = dict(weights)

    def counts(self, batch: Batch) -> dict[Pair, Tensor]:
        """The tokens of the longer segments."""
        return {
            pair: torch.tensor(sum(max(len(each.writes), len(each.read)) for each in segment_pairs(batch, pair)))
            for pair in self.weights
        }

    @contextmanager
    def watch(self, model: ZippedTowers, batch: Batch, counts: Mapping[Pair, Tensor]) -> Iterator[list[Tensor]]:
        """A cost of each zip layer: the mean of all tokens', over the layers of its pair."""
        costs: list[Tensor] = []
        with ExitStack() as hooks:
            for (reader, source), weight in self.weights.items():
                if not (found := segment_pairs(batch, (reader, source))):
                    continue
                rows = rows_that_see(batch[reader], batch[source])
                number = {row: n for n, row in enumerate([] if rows is None else rows.tolist())}
                here = [SegmentPair(number.get(s.row, s.row), s.writes, s.read, s.labels) for s in found]
                layers = len(model.layer_pairs[reader, source])
                for k in range(layers):
                    watch = _Watch(costs, weight / layers, counts[reader, source], here)
                    hooks.callback(watched_layer(model.zip_layer(reader, source, k), watch).remove)
            yield costs


def forward_sum(scores: Tensor, pairs: Sequence[SegmentPair]) -> Tensor:
    """Summed over pairs, in nats; a scalar.

    Args:
        scores: of attention before softmax, ``[rows, heads, queries, tokens]``. pairs: of segments.
    """
    wide = [each for each in pairs if len(each.writes) >= len(each.read)]
    tall = [each for each in pairs if len(each.writes) < len(each.read)]
    sums = [_along(scores, [(e.row, e.writes, e.read) for e in wide])] if wide else []
    sums += [_along(scores.transpose(2, 3), [(e.row, e.read, e.writes) for e in tall])] if tall else []
    return torch.stack(sums).sum()


def _along(scores: Tensor, pairs: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Of segments of which the first, along which alignments run, is the longer one.

    Args:
        scores: ``[rows, heads, long, short]``. pairs: row, places of the longer segment, places of the shorter one.
    """
    longer, shorter = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
    times, tokens = (torch.tensor([len(places) for places in each]) for each in (longer, shorter))
    order = torch.arange(int(tokens.max()))
    made = torch.tensor([pair[0] for pair in pairs]), padded(longer), padded(shorter), order >= tokens[:, None]
    row, long, short, beyond = send(made, scores.device)
    # [heads, pairs, long, short]
    chosen = scores.transpose(0, 1)[:, row[:, None, None], long[:, :, None], short[:, None]]
    chosen = chosen.float().masked_fill(beyond[:, None], NEVER).log_softmax(-1).logsumexp(0) - math.log(len(chosen))
    chosen = F.pad(chosen, (1, 0), value=BLANK).log_softmax(-1)
    (labels,) = send([(1 + order).repeat(len(pairs), 1)], scores.device)
    return summed_ctc(chosen.transpose(0, 1), labels, times, tokens)


class _Watch:
    """Called of a zip layer's calls; it writes their weighted cost down."""

    def __init__(self, costs: list[Tensor], weight: float, count: Tensor, pairs: Sequence[SegmentPair]) -> None:
        self.costs, self.weight, self.count, self.pairs = costs, weight, count, pairs

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], update: Tensor | None = None) -> None:
        assert isinstance(layer, ZipLayer)
        if len(args) < 4:  # it remembers
            return
        self.costs.append(self.weight * share(forward_sum(layer.scores(*args[:3]), self.pairs), self.count))
