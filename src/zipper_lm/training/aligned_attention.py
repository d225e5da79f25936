"""Aligned attention: what is written next is looked for where joint CTC hears it.

Attention that is to find its place in a long segment learns that late, and the more so where the reader is a frozen
LLM: until it has, all that it is told is the loss of the text. Joint CTC knows places sooner. The likeliest alignment
of the text with what a zip layer remembers (Viterbi's, of the head that spells from it; Graves et al. 2006, section 4)
tells each query where its next token is spelled. The layer's attention, its heads averaged, costs the negative
logarithm of what falls near that place, as in supervised attention of translation models (Liu et al. 2016, arXiv
1609.04186). The alignment itself is not moved by this loss. Attention is computed a second time for it, as
probabilities, which the backward pass keeps: memory grows with the product of both lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zipper_lm.data.collation import Batch
from zipper_lm.fusion.loss import share
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import rows_that_see
from zipper_lm.fusion.zips import ZipLayer
from zipper_lm.training.beside import Pair, SegmentPair, padded, segment_pairs, watched_layer
from zipper_lm.training.ctc import Ctc, Spelled
from zipper_lm.utils.host import send
from zipper_lm.utils.letters import BLANK, letters_of
from zipper_lm.utils.shapes import has_values

WIDTH = 3.0
"""Standard deviation of what is near, in tokens of the source: at 25 a second an eighth of one."""
LEAST = 1e-3
"""Added to what falls near: a query that looks wholly elsewhere costs 6.9 nats, not infinitely many."""


@dataclass(frozen=True)
class Written:
    """A text that is written, and which of its letters each token brings.

    Attributes:
        segments: where in the batch. spelled: its letters. ends: int64 ``[tokens]``, how many letters are written when
            each of the tokens is.
    """

    segments: SegmentPair
    spelled: Spelled
    ends: Tensor


class AlignedAttention:
    """The loss of pairs by their weights; see `zipper_lm.training.beside.BesideLoss`.

    Args:
        weights: of pairs. spelling: joint CTC of these pairs, which knows the places.

    Raises:
        ValueError: for a pair that joint CTC does not spell.
    """

    name = "aligned_attention"

    def __init__(self, weights: Mapping[Pair, float], spelling: Ctc | None) -> None:
        self.weights: Mapping[Pair, float] = dict(weights)
        lacking = [f"{s}->{r}" for r, s in weights if spelling is None or (r, s) not in spelling.weights]
        if spelling is None or lacking:
            raise ValueError(
                f"training.aligned_attention names {lacking}, but training.ctc, which knows places, does not"
            )
        self.spelling = spelling

    def written(self, batch: Batch, pair: Pair) -> list[Written]:
        """The texts of a batch that a pair's reader writes from its source, and that joint CTC counts."""
        return [
            Written(segments, spelled, self._ends(pair[0], segments.labels.tolist(), len(spelled.letters)))
            for segments, spelled in self._counted(batch, pair)
        ]

    def counts(self, batch: Batch) -> dict[Pair, Tensor]:
        """The queries that count: of each text all, the one that is to end it among them."""
        return {
            pair: torch.tensor(sum(len(segments.writes) for segments, _ in self._counted(batch, pair)))
            for pair in self.weights
        }

    def _counted(self, batch: Batch, pair: Pair) -> list[tuple[SegmentPair, Spelled]]:
        texts = zip(segment_pairs(batch, pair), self.spelling.spelled(batch, pair), strict=True)
        return [(segments, spelled) for segments, spelled in texts if spelled.letters and spelled.fits]

    def _ends(self, reader: str, ids: list[int], letters: int) -> Tensor:
        """How many letters are written when each token is, int64 ``[tokens]``."""
        ends = torch.tensor([len(letters_of(text)) for text in self.spelling.decode(reader, [[i] for i in ids])])
        ends = ends.cumsum(0)
        if ends[-1] != letters:  # some tokens are a part of a letter, or written otherwise than alone
            parts = [ids[: n + 1] for n in range(len(ids))]
            ends = torch.tensor([len(letters_of(text)) for text in self.spelling.decode(reader, parts)])
        return ends.clamp_max(letters).cummax(0).values

    @contextmanager
    def watch(self, model: ZippedTowers, batch: Batch, counts: Mapping[Pair, Tensor]) -> Iterator[list[Tensor]]:
        """A cost of each zip layer: the mean of all queries', over the layers of its pair."""
        costs: list[Tensor] = []
        with ExitStack() as hooks:
            for pair, weight in self.weights.items():
                if not (texts := self.written(batch, pair)):
                    continue
                rows = rows_that_see(batch[pair[0]], batch[pair[1]])
                number = {row: n for n, row in enumerate([] if rows is None else rows.tolist())}
                here = [number.get(each.segments.row, each.segments.row) for each in texts]
                heads: Sequence[nn.Module] = self.spelling.heads_of(pair)
                for k, head in enumerate(heads):
                    watch = _Watch(costs, head, weight / len(heads), counts[pair], texts, here)
                    layer = model.zip_layer(*pair, k)
                    hooks.callback(layer.memory_projection.register_forward_hook(watch.remembered).remove)
                    hooks.callback(watched_layer(layer, watch).remove)
            yield costs


def best_alignments(log_probs: Tensor, times: Tensor, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Where each letter of some texts stands along the likeliest of all paths of CTC that spell them.

    Args:
        log_probs: ``[texts, time, classes]``. times: int64 ``[texts]``, how many count. texts: letters that fit.

    Returns:
        per text, float32 ``[letters]``: the mean of the places at which a letter stands.
    """
    time = log_probs.shape[1]
    rows = [[BLANK, *(i for letter in text for i in (letter, BLANK))] for text in texts]
    labels = padded([torch.tensor(row) for row in rows]).to(log_probs.device)  # a letter between two blanks
    size, never = labels.shape[1], torch.finfo(log_probs.dtype).min / 4
    emitted = log_probs.gather(2, labels[:, None].expand(-1, time, -1))
    leaps = (labels != BLANK) & (labels != F.pad(labels, (2, 0))[:, :size])  # a blank may be left out between these
    score = torch.full_like(emitted[:, 0], never)
    score[:, :2] = emitted[:, 0, :2]
    steps = []
    for t in range(1, time):
        one, two = (F.pad(score, (by, 0), value=never)[:, :size] for by in (1, 2))
        best, step = torch.stack([score, one, two.masked_fill(~leaps, never)]).max(0)
        goes_on = (t < times)[:, None]
        score, step = torch.where(goes_on, best + emitted[:, t], score), torch.where(goes_on, step, 0)
        steps.append(step)
    last = torch.tensor([len(row) - 1 for row in rows], device=log_probs.device)[:, None]
    ends = torch.cat([last, last - 1], 1)
    at = ends.gather(1, score.gather(1, ends).argmax(1, keepdim=True))
    path = [at]
    for step in reversed(steps):
        at = at - step.gather(1, at)
        path.append(at)
    places, states = torch.arange(time, device=at.device), torch.cat(path[::-1], 1)
    found = []
    for row, text, count in zip(states, texts, times.tolist()):
        here, letter = places[:count], row[:count]
        spelled = (letter % 2).bool()
        sums, hits = (
            torch.zeros(len(text), device=at.device).index_add_(0, letter[spelled] // 2, values[spelled].float())
            for values in (here, torch.ones_like(here))
        )
        found.append(sums / hits)
    return found


def places_sought(letters: Tensor, ends: Tensor, last: int) -> Tensor:
    """Where each query looks: at the middle of the letters that its next token brings, and at last at the end.

    Args:
        letters: float32 ``[letters]``, where they stand. ends: int64 ``[tokens]``, the letters written with each token.
            last: the source's last place.

    Returns:
        float32 ``[tokens + 1]``. A token that brings no letter is sought where the letter before it stands.
    """
    sums = F.pad(letters.cumsum(0), (1, 0))
    begins = F.pad(ends[:-1], (1, 0))
    number = ends - begins
    before = letters[(begins - 1).clamp_min(0)]
    means = (sums[ends] - sums[begins]) / number.clamp_min(1)
    return F.pad(torch.where(number > 0, means, before), (0, 1), value=float(last))


class _Watch:
    """Told of what a zip layer remembers, then of how it attends; it writes its weighted cost down."""

    def __init__(
        self,
        costs: list[Tensor],
        head: nn.Module,
        weight: float,
        count: Tensor,
        texts: Sequence[Written],
        rows: Sequence[int],
    ) -> None:
        self.costs, self.head, self.weight, self.count, self.texts, self.rows = costs, head, weight, count, texts, rows
        self.sought: list[Tensor] = []

    @torch.no_grad()
    def remembered(self, projection: nn.Module, args: tuple[Any, ...], memory: Tensor) -> None:
        """Find the places."""
        each = self.texts[0].spelled.places
        tokens = [text.segments.read for text in self.texts]
        row, read = send([torch.tensor(self.rows), padded(tokens)], memory.device)
        logits = self.head(memory[row[:, None], read].to(next(self.head.parameters()).dtype)).float()
        log_probs = logits.unflatten(2, (each, -1)).flatten(1, 2).log_softmax(-1)
        times = torch.tensor([len(t) * each for t in tokens])
        spelled = [text.spelled.letters for text in self.texts]
        if not has_values(log_probs):  # a plan's: what is computed of places is the same wherever they are
            log_probs = torch.zeros(log_probs.shape)
        found = best_alignments(log_probs.cpu(), times, spelled)
        self.sought = [
            places_sought(letters / each, text.ends, len(text.segments.read) - 1)
            for letters, text in zip(found, self.texts)
        ]

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], update: Tensor | None = None) -> None:
        """Count what is looked at."""
        assert isinstance(layer, ZipLayer)
        if len(args) < 4:  # it remembers
            return
        segments = [text.segments for text in self.texts]
        writes, read = padded([each.writes for each in segments]), padded([each.read for each in segments])
        near, counts = torch.zeros(*writes.shape, read.shape[1]), torch.zeros(writes.shape, dtype=torch.bool)
        for n, (each, places) in enumerate(zip(segments, self.sought)):
            apart = torch.arange(len(each.read)) - places[:, None]
            near[n, : len(places), : len(each.read)] = torch.exp(-(apart**2) / (2 * WIDTH**2))
            counts[n, : len(places)] = True
        attention = layer.attention_map(*args).float().mean(1)
        row, writes, read, near, counts = send([torch.tensor(self.rows), writes, read, near, counts], attention.device)
        found = attention[row[:, None, None], writes[:, :, None], read[:, None]]
        cost = -((found * near).sum(2) + LEAST).log()
        self.costs.append(self.weight * share(torch.where(counts, cost, 0.0).sum(), self.count))
