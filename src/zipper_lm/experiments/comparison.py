"""Runs against runs: paired over seeds and test rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zipper_lm.evaluation.word_error_rate import paired_interval
from zipper_lm.experiments.records import Cell


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two cells on the seeds that both have.

    Attributes:
        difference, low, high: ours minus theirs in points of WER, and its 95 % paired bootstrap interval.
        ours, theirs: WER in per cent, mean over the seeds.
        relative: the difference in per cent of theirs; above: of what is above the codec alone, `None` where that is
            not known, or nothing is.
        seeds: how many.
    """

    difference: float
    low: float
    high: float
    ours: float
    theirs: float
    relative: float
    above: float | None
    seeds: int


def compare(mine: Cell, other: Cell, task: str) -> Comparison | None:
    """One cell minus another; `None` without a common seed."""
    ours, theirs = ({r["run"]["seed"]: r["scores"][task] for r in cell} for cell in (mine, other))
    if not (seeds := sorted(ours.keys() & theirs.keys())):
        return None
    references = ours[seeds[0]]["references"]
    assert all(x[s]["references"] == references for x in (ours, theirs) for s in seeds), "one test split"
    a, b = ([x[s]["hypotheses"] for s in seeds] for x in (ours, theirs))
    difference, low, high = paired_interval(references, a, b)
    rates = [float(np.mean([x[s]["wer"] for s in seeds])) for x in (ours, theirs)]
    above = None
    if all("oracle_wer" in x[s] for x in (ours, theirs) for s in seeds):
        floors = [float(np.mean([x[s]["oracle_wer"] for s in seeds])) for x in (ours, theirs)]
        left = [rate - floor for rate, floor in zip(rates, floors)]
        above = _relative(*left) if min(left) > 0 else None  # else there is nothing to take a share of
    return Comparison(
        difference=difference,
        low=low,
        high=high,
        ours=rates[0],
        theirs=rates[1],
        relative=_relative(*rates),
        above=above,
        seeds=len(seeds),
    )


def _relative(ours: float, theirs: float) -> float:
    return 100 * (ours - theirs) / max(theirs, 1e-9)
