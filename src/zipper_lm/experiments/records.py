"""The records of an experiment, by arm and point."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zipper_lm.experiments.plan import PLAN_FILE, Experiment, cells_of
from zipper_lm.jobs.recipes.reader import build

Cell = list[dict[str, Any]]
"""The records of one arm at one point, a seed each."""


@dataclass(frozen=True)
class Results:
    """The records of one experiment.

    Attributes:
        name: of its folder. experiment: what was planned. cells: by (point, arm). trials: how many records of trials.
    """

    name: str
    experiment: Experiment
    cells: dict[tuple[str, str], Cell]
    trials: int


def read_record(file: Path) -> dict[str, Any]:
    """The record of one run.

    Raises:
        ValueError: if it is damaged, or none.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: no record of a run can be read from it: {error}") from error
    if not isinstance(record, dict) or not {"run", "run_hash", "scores"} <= record.keys():
        raise ValueError(f"{file}: no record of a run: it lacks run, run_hash or scores")
    return record


def read_results(folder: str | Path) -> Results:
    """What `run_experiment` wrote; records of arms, points, seeds or tasks that the plan does not have are left out.

    Raises:
        ValueError: if there is no experiment, or a record cannot be read.
    """
    folder = Path(folder).resolve()  # "." has no name
    if not (folder / PLAN_FILE).is_file():
        raise ValueError(f"{folder}: no {PLAN_FILE} there; run zipper experiment first")
    experiment = build(Experiment, json.loads((folder / PLAN_FILE).read_text(encoding="utf-8")))
    cells: dict[tuple[str, str], Cell] = defaultdict(list)
    trials, planned = 0, cells_of(experiment)
    for file in sorted(folder.glob("*--*.json")):
        record = read_record(file)
        run = record["run"]
        if (run["point"], run["arm"]) not in planned:
            continue  # of an earlier plan
        if run["reported"]:
            if run["seed"] not in experiment.seeds or not set(experiment.tasks) <= set(record["scores"]):
                continue
            cells[run["point"], run["arm"]].append(record)
        else:
            trials += 1
    return Results(folder.name, experiment, dict(cells), trials)
