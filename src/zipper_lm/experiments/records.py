"""The records of an experiment: one file, read by arm and point, and added to by any number of processes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from zipper_lm.experiments.packing import Plain, pack, unpack
from zipper_lm.experiments.plan import Experiment, Run, cells_of
from zipper_lm.jobs.recipes.reader import build
from zipper_lm.utils.files import as_json, new_file
from zipper_lm.utils.json_files import read_json, read_mapping

SUFFIX = ".jsonl"
EARLIER_PLAN = "experiment.json"
"""Beside the records of an earlier version, which were a file each."""

Cell = list[dict[str, Any]]
"""The records of one arm at one point, a seed each."""


@dataclass(frozen=True)
class Results:
    """The records of one experiment.

    Attributes:
        name: of its file. experiment: what was planned. cells: by (point, arm). trials: how many records of trials.
        failed: names of the runs that diverged, which are in no cell.
    """

    name: str
    experiment: Experiment
    cells: dict[tuple[str, str], Cell]
    trials: int
    failed: list[str] = field(default_factory=list)


def records_file(path: str | Path) -> Path:
    """Where records are that are named by `path`, with or without the ending.

    Raises:
        ValueError: if `path` is a folder of something else.
    """
    path = Path(path).resolve()  # "." has no name
    if path.suffix == SUFFIX:
        return path
    file = path.with_name(path.name + SUFFIX)
    if path.is_dir() and not file.is_file() and not (path / EARLIER_PLAN).is_file():
        raise ValueError(f"{path} is a folder; records are a file, such as {path / ('NAME' + SUFFIX)}")
    return file


def name_of(record: Mapping[str, Any]) -> str:
    """The name of the run that a record is of."""
    return Run(**record["run"]).name


def read_records(path: str | Path) -> tuple[Plain | None, dict[str, Plain]]:
    """The experiment as a plain mapping (`None` if there are no records) and the record of each run by its name.

    Args:
        path: of the file; a folder of that name, from an earlier version, is read where there is no file.

    Raises:
        ValueError: if a record cannot be read.
    """
    file = records_file(path)
    if file.is_file():
        try:
            plan, found = unpack(file.read_text(encoding="utf-8"))
            return plan, {name_of(record): record for record in found}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {error}") from error
    folder = file.with_suffix("")
    if not (folder / EARLIER_PLAN).is_file():
        return None, {}
    plan = read_mapping(folder / EARLIER_PLAN)
    return plan, {one.stem: _read_one(one) for one in sorted(folder.glob("*--*.json"))}


def _read_one(file: Path) -> Plain:
    try:
        record = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file}: no record of a run can be read from it: {error}") from error
    if not isinstance(record, dict) or not {"run", "run_hash", "scores"} <= record.keys():
        raise ValueError(f"{file}: no record of a run: it lacks run, run_hash or scores")
    return record


def keep(
    path: str | Path, plan: Mapping[str, Any] | None = None, record: Mapping[str, Any] | None = None
) -> dict[str, Plain]:
    """Put the experiment, or the record of a run, into a file of records; processes that share it take turns.

    Args:
        path: of the file. plan: replaces the experiment that is there; needed in a new file. record: is added, or
            replaces that of the same run.

    Returns:
        The records that are there now, by name, as they are read again.

    Raises:
        ValueError: if what is there cannot be read.
    """
    file = records_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        there, records = read_records(file)
        if record is not None:
            records[name_of(record)] = dict(record)
        # Plain before it is packed: what packing compares are values as JSON has them.
        plan, *found = json.loads(as_json([plan or there, *records.values()]))
        with new_file(file, overwrite=True) as new:
            new.write_text(pack(plan, found), encoding="utf-8")
    return {name_of(record): record for record in found}


def read_results(path: str | Path) -> Results:
    """What `run_experiment` wrote; records of arms, points, seeds or tasks that the plan does not have are left out.

    Raises:
        ValueError: if there is no experiment, or a record cannot be read.
    """
    file = records_file(path)
    plan, records = read_records(file)
    if plan is None:
        raise ValueError(f"{file}: no records there; run zipper experiment first")
    experiment = build(Experiment, plan)
    cells: dict[tuple[str, str], Cell] = defaultdict(list)
    trials, failed, planned = 0, [], cells_of(experiment)
    for _, record in sorted(records.items()):
        run = record["run"]
        if (run["point"], run["arm"]) not in planned:
            continue  # of an earlier plan
        if "failed" in record:
            failed.append(name_of(record))
        elif run["reported"]:
            if run["seed"] not in experiment.seeds or not set(experiment.tasks) <= set(record["scores"]):
                continue
            cells[run["point"], run["arm"]].append(record)
        else:
            trials += 1
    return Results(file.stem, experiment, dict(cells), trials, failed)
