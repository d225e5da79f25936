"""One tower's step in an engine: who sits in it, who waits for it, and how large it is."""

from __future__ import annotations

import gc
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.generation.engine.rows import Rows, bucket, needed_memory
from zipper_lm.generation.engine.step import Step, copy_of, like_cache
from zipper_lm.generation.engine.weights import Form, weights_as
from zipper_lm.generation.engine.writing import Sample, Seats

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Sitting:
    """A segment whose samples are in a step.

    Attributes:
        owner: whose it is. seats: what was asked for. samples: its rows. error: what it alone failed by.
    """

    owner: Any
    seats: Seats
    samples: list[Sample] = field(default_factory=list)
    error: Exception | None = None


class Lane:
    """A tower's step, made when it is first needed, and anew when more room is.

    Args:
        model: the model. name: the tower. slots: rows. compile: whether its step is compiled. weights: of its copy.
    """

    def __init__(self, model: ZippedTowers, name: str, slots: int, compile: bool, weights: Form | None) -> None:
        self.model, self.name, self.slots, self.compile, self.weights = model, name, slots, compile, weights
        self.waiting: deque[Sitting] = deque()
        self.sitting: list[Sitting] = []
        self.step: Step | None = None
        self.attention = False  # whether its copy may attend as `attention.py` does

    @property
    def busy(self) -> bool:
        """Whether some row writes."""
        return any(not sample.done for each in self.sitting for sample in each.samples)

    def seat(self) -> None:
        """Let those who wait sit down, in turn, so far as there is room. Who needs a larger step waits until the one
        that there is stands empty, and nobody overtakes."""
        while self.waiting:
            new = self.waiting[0]
            if not self._fits(new.seats):
                if self.sitting:
                    return
                self._make(new.seats)
            assert self.step is not None
            if len(self.step.rows.free()) < new.seats.wanted.rows:
                return
            self.waiting.popleft()
            self.sitting.append(new)
            self._sit(self.step, new)

    def _fits(self, seats: Seats) -> bool:
        if self.step is None or seats.columns > self.step.rows.columns:
            return False
        have = self.step.rows.memory_sizes()
        return all(size <= have.get(s, 0) for s, size in needed_memory(self.model, self.name, [seats.state]).items())

    def _make(self, seats: Seats) -> None:
        """A step with room for what is asked for, and no less than before."""
        tower, old = self.model.tower(self.name), self.step
        memory = needed_memory(self.model, self.name, [seats.state])
        sizes = {s: bucket(max(n, 0 if old is None else old.rows.memory_sizes().get(s, 0))) for s, n in memory.items()}
        columns = bucket(max(seats.columns, 0 if old is None else old.rows.columns))
        if old is not None:  # its memory is free before the new one's is asked for
            self.step = old = None
            gc.collect()  # its hooks refer to it
        rows = Rows(self.model, self.name, self.slots, columns, sizes, self.model.specials[self.name].pad)
        copied = copy_of(tower, self.attention)
        weights_as(copied, self.weights, tower.adapter_names, rows=self.slots, compiled=self.compile)
        self.step = Step(self.model, self.name, copied, rows, like_cache(tower), self.compile)
        logger.info(
            "tower %r: a step of %d rows, %d tokens each, memory %s%s",
            *(self.name, self.slots, columns, sizes, ", compiled at its first token" if self.compile else ""),
        )

    def _sit(self, step: Step, new: Sitting) -> None:
        seats, free = new.seats, iter(step.rows.free())
        for wish in seats.wanted.wishes:
            row = next(free)
            bos = int(seats.stream[-1])
            step.sit(row, wish, bos, seats.involved, seats.state, seats.stream)
            if wish.rows == 2:
                step.sit_beside(row, next(free), wish, bos, seats.bare, seats.stream)
            new.samples.append(Sample(step, row, wish, [], []))

    def run(self) -> list[Sitting]:
        """One step; returns those whose samples are all done by it, or that failed."""
        step = self.step
        assert step is not None
        if step.rows.at == step.rows.columns:
            step.move(-step.rows.room())
        ids, logprobs = step()
        done = []
        for each in self.sitting:
            if all(sample.done for sample in each.samples):
                continue
            try:
                for sample in each.samples:
                    if not sample.done:
                        self._take(each, sample, ids[sample.row], None if logprobs is None else logprobs[sample.row])
            except Exception as error:  # of any kind: what a tokenizer says of ids
                each.error = error
                for sample in each.samples:
                    self._finish(sample)
            if all(sample.done for sample in each.samples):
                done.append(each)
        return done

    def _take(self, each: Sitting, sample: Sample, token: int, logprob: float | None) -> None:
        wanted = each.seats.wanted
        if logprob is not None:
            sample.logprobs.append(logprob)
        sample.ended = token == sample.wish.eos
        if not sample.ended:
            sample.ids.append(token)
            if len(wanted.wishes) == 1:
                each.seats.on_token(token)
        if sample.ended or len(sample.ids) >= wanted.most or (wanted.strings and wanted.strings.end([sample.ids])[0]):
            self._finish(sample)

    def _finish(self, sample: Sample) -> None:
        if not sample.done:
            sample.done = True
            sample.step.rest(sample.row)

    def leave(self, samples: list[Sample]) -> None:
        """Free the rows of samples, as far as they sit here."""
        mine = {id(sample) for sample in samples}
        leaving = [each for each in self.sitting if any(id(s) in mine for s in each.samples)]
        self.sitting = [each for each in self.sitting if each not in leaving]
        for sample in (s for each in leaving for s in each.samples):
            sample.step.leave(sample.row)

    def drop(self, owner: Any) -> None:
        """Forget somebody who waits or sits here."""
        self.waiting = deque(each for each in self.waiting if each.owner is not owner)
        for each in [each for each in self.sitting if each.owner is owner]:
            self.leave(each.samples)
            if each in self.sitting:  # it failed before it had a row
                self.sitting.remove(each)

    def renew(self) -> None:
        """Make the step anew when it is next needed: the weights are others."""
        assert not self.sitting
        self.step = None
