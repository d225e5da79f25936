"""Runs against runs: paired over seeds and test rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zipper_lm.evaluation.word_error_rate import PLAIN, normaliser_of, paired_interval
from zipper_lm.experiments.records import Cell


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two cells on the seeds that both have.

    Attributes:
        difference, low, high: ours minus theirs in points of WER, and its 95 % interval over seeds and test rows (see
            `paired_interval`).
        ours, theirs: WER in per cent, mean over the seeds.
        relative: the difference in per cent of theirs; above: of what is above the codec alone, `None` where that is
            not known, or nothing is.
        seeds: how many. judges: how many different ones heard what was generated; 0 where none is needed.
    """

    difference: float
    low: float
    high: float
    ours: float
    theirs: float
    relative: float
    above: float | None
    seeds: int
    judges: int


def compare(mine: Cell, other: Cell, task: str) -> Comparison | None:
    """One cell minus another; `None` without a common seed.

    Raises:
        ValueError: if they were scored on different rows, or texts were normalised in different ways.
    """
    ours, theirs = ({r["run"]["seed"]: r["scores"][task] for r in cell} for cell in (mine, other))
    if not (seeds := sorted(ours.keys() & theirs.keys())):
        return None
    references = ours[seeds[0]]["references"]
    if not all(x[s]["references"] == references for x in (ours, theirs) for s in seeds):
        arms = " and ".join(f"{cell[0]['run']['arm']} at {cell[0]['run']['point']}" for cell in (mine, other))
        raise ValueError(f"{task}: {arms} were not scored on the same rows; was the test split changed between them?")
    # A judge says the same of the same originals, and no two that were fitted apart do.
    judges = {x[s].get("judge_wer_on_originals") for x in (ours, theirs) for s in seeds} - {None}
    a, b = ([x[s]["hypotheses"] for s in seeds] for x in (ours, theirs))
    named = {x[s].get("normaliser", PLAIN) for x in (ours, theirs) for s in seeds}
    if len(named) > 1:
        raise ValueError(f"{task}: texts were compared by {sorted(named)}: such rates are not of one kind")
    difference, low, high = paired_interval(references, a, b, clean=normaliser_of(named.pop()))
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
        judges=len(judges),
    )


def _relative(ours: float, theirs: float) -> float:
    return 100 * (ours - theirs) / max(theirs, 1e-9)
