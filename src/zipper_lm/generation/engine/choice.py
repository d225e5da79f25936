"""The choice of the next token within a captured step, for rows of different settings.

Everything that a setting asks for is a tensor with one entry for each row, so that a row's settings change nothing in
the step; which kinds of work there are at all (`Kinds`) is known when it is captured. The order is that of
transformers' processors in `generation/segment.py`: repetition penalty, least length, suppressed ids, `stop_threshold`,
guidance, temperature, what is too unlikely, the draw.

R rows, V ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from zipper_lm.generation.engine.reach import Reach
from zipper_lm.generation.sampling import NEVER, Draw, gumbel, keep_likely, stream_key


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How one segment's tokens are chosen.

    Attributes:
        suppressed: ids that are never written. eos: the id that ends it. least: tokens before it may end.
        draw: how it is drawn; `None`: the likeliest. seed: of the draw. numbers: what tells draws of one seed apart: of
            the document in its call, of the segment in it, of the sample. penalty: as `repetition_penalty`. threshold:
            as `stop_threshold`. guidance: as `guidance_scale`. scored: whether log-probabilities come back.
    """

    suppressed: frozenset[int]
    eos: int
    least: int = 0
    draw: Draw | None = None
    seed: int = 0
    numbers: tuple[int, int, int] = (0, 0, 0)
    penalty: float = 1.0
    threshold: float | None = None
    guidance: float = 1.0
    scored: bool = False

    @property
    def rows(self) -> int:
        """How many rows it takes: with guidance, the tower alone writes beside it."""
        return 1 if self.guidance == 1.0 else 2


@dataclass(frozen=True)
class Kinds:
    """Which kinds of work some row asks for."""

    least: bool = False
    drawn: bool = False
    filtered: bool = False
    penalised: bool = False
    threshold: bool = False
    guided: bool = False
    scored: bool = False

    @classmethod
    def of(cls, wish: Wish) -> Kinds:
        """Of one row."""
        return cls(
            least=wish.least > 0,
            drawn=wish.draw is not None,
            filtered=wish.draw is not None and wish.draw.filters,
            penalised=wish.penalty != 1.0,
            threshold=wish.threshold is not None,
            guided=wish.guidance != 1.0,
            scored=wish.scored,
        )

    @classmethod
    def all(cls) -> Kinds:
        """Every one."""
        return cls(**{f.name: True for f in fields(cls)})

    @classmethod
    def union(cls, wishes: Iterable[Wish]) -> Kinds:
        """Of several."""
        found = [cls.of(wish) for wish in wishes]
        return cls(**{f.name: any(getattr(kinds, f.name) for kinds in found) for f in fields(cls)})


class Choice:
    """Settings of all rows.

    Args:
        rows: R. size: V. eos: the tower's EOS id. device: of the logits.
    """

    def __init__(self, rows: int, size: int, eos: int, device: torch.device) -> None:
        self.rows, self.size, self.eos, self.device = rows, size, eos, device
        self.wishes: dict[int, Wish] = {}
        self.kinds = Kinds()

        def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        whole = torch.long
        self.allowed = torch.ones(rows, size, dtype=torch.bool, device=device)
        self.written: Tensor | None = None  # bool [R, V]: ids that the row's stream has; made when one is penalised
        self.least, self.keys, self.top_k = full(0, whole), full(0, whole), full(size, whole)
        self.drawn, self.guided = full(0, torch.bool), full(0, torch.bool)
        self.temperature, self.top_p, self.min_p, self.penalty = full(1), full(1), full(0), full(1)
        self.threshold, self.scale = full(2), full(1)
        # A row without zips beside one that is guided writes what that one writes.
        self.bare, self.leader = (torch.arange(rows, device=device) for _ in range(2))
        self.logprobs = full(0)

    def sit(self, row: int, wish: Wish, stream: Tensor, bare: int | None = None) -> None:
        """Take a row; `stream`: int64, the ids that it has written or been given; `bare`: the row beside it."""
        self.wishes[row] = wish
        self.kinds = Kinds.union(self.wishes.values())
        self.allowed[row] = True
        if wish.suppressed:
            self.allowed[row, torch.tensor(sorted(wish.suppressed), device=self.device)] = False
        draw = wish.draw or Draw()
        key = torch.tensor([wish.seed, *wish.numbers], device=self.device)
        self.least[row], self.drawn[row], self.keys[row] = wish.least, wish.draw is not None, stream_key(*key)
        self.temperature[row], self.top_k[row] = draw.temperature, draw.top_k or self.size
        self.top_p[row], self.min_p[row], self.penalty[row] = draw.top_p, draw.min_p, wish.penalty
        self.threshold[row] = 2.0 if wish.threshold is None else wish.threshold
        self.scale[row], self.guided[row] = wish.guidance, wish.guidance != 1.0
        self.bare[row] = row if bare is None else bare
        self.leader[row] = row
        if bare is not None:
            self.leader[bare] = row
        self.prepare(self.kinds)
        if self.written is not None:
            self.written[row] = False
            self.written[row, stream.to(self.device)] = True

    def prepare(self, kinds: Kinds) -> None:
        """Make what is needed for some kinds of work alone."""
        if kinds.penalised and self.written is None:
            self.written = torch.zeros_like(self.allowed)

    def leave(self, row: int) -> None:
        """Free a row, and the one beside it."""
        self.wishes.pop(row, None)
        self.kinds = Kinds.union(self.wishes.values())
        self.drawn[row] = self.guided[row] = False
        self.threshold[row], self.penalty[row], self.least[row] = 2.0, 1.0, 0
        self.leader[int(self.bare[row])] = self.bare[row]
        self.bare[row] = row

    def progress(self) -> list[Tensor]:
        """What a choice writes, and reads in the next one."""
        return [] if self.written is None else [self.written]

    def choose(self, logits: Tensor, place: Tensor, kinds: Kinds, reach: Reach) -> Tensor:
        """Ids ``[r]`` of logits ``[r, V]``, and their log-probabilities in `logprobs` where they are asked for.

        Args:
            logits: what each tower says. place: int64 ``[r]``: how many tokens each segment has. kinds: of work.
            reach: which rows they are of.
        """
        raw, rows, here = logits.float(), reach.rows, reach.here
        threshold = here(self.threshold)
        # Their places among the rows that are computed: who writes is one of them, and so is who writes beside it.
        bare, leader = (n if rows is None else torch.searchsorted(rows, n[rows]) for n in (self.bare, self.leader))
        scores = raw
        if kinds.penalised and self.written is not None:
            penalty = here(self.penalty)[:, None]
            changed = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(here(self.written), changed, scores)
        ids = torch.arange(raw.shape[-1], device=raw.device)
        allowed = here(self.allowed)
        if kinds.least:
            allowed = allowed & ~((ids == self.eos) & (place < here(self.least))[:, None])
        scores = torch.where(allowed, scores, NEVER)
        if kinds.threshold:
            stops = scores.softmax(-1)[:, self.eos] >= threshold
            decided = torch.where((ids == self.eos) == stops[:, None], scores, NEVER)
            scores = torch.where((threshold <= 1.0)[:, None], decided, scores)
        if kinds.guided:
            # Of logits as of log-probabilities: they differ by one number a row, which changes no choice.
            alone = raw[bare]
            mixed = torch.where(scores.isneginf(), scores, alone + here(self.scale)[:, None] * (scores - alone))
            scores = torch.where(here(self.guided)[:, None], mixed, scores)
        if kinds.drawn:
            drawn = scores / here(self.temperature)[:, None]
            if kinds.filtered:
                drawn = keep_likely(drawn, here(self.top_k), here(self.top_p), here(self.min_p))
            drawn = drawn + gumbel(stream_key(here(self.keys), place), raw.shape[-1])
            scores = torch.where(here(self.drawn)[:, None], drawn, scores)
        chosen = scores.argmax(-1)[leader]
        numbers = torch.arange(self.rows, device=raw.device) if rows is None else rows
        if kinds.scored:
            self.logprobs.index_copy_(0, numbers, raw.log_softmax(-1).gather(1, chosen[:, None])[:, 0])
        if kinds.penalised and self.written is not None:
            self.written.index_put_((numbers, chosen), torch.ones_like(chosen, dtype=torch.bool))
        return chosen
