"""`zipper experiment`: every run of an experiment, one record each; what is there is not run again."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from zipper_lm.data.readers import read_rows
from zipper_lm.document import Document
from zipper_lm.evaluation.judge import Recogniser
from zipper_lm.evaluation.judging import judge_for
from zipper_lm.evaluation.scoring import SHORT_NAMES, score_task, yardsticks
from zipper_lm.experiments.plan import Experiment, Run, before_of, points_of, recipe_of, run_hash, runs_of, trials_of
from zipper_lm.files import new_file
from zipper_lm.loading import load
from zipper_lm.recipe import to_mapping
from zipper_lm.training.fuse import fuse, generation_settings, make_towers
from zipper_lm.training.recipes import FuseRecipe
from zipper_lm.training.trainer import latest_checkpoint
from zipper_lm.training.working import working_folder

TEST = "test"
PLAN_FILE = "experiment.json"


def run_experiment(
    experiment: Experiment, results: str | Path, work: str | Path, console: Console | None = None
) -> list[dict[str, Any]]:
    """Run what has no record yet.

    Args:
        experiment: what to do.
        results: folder of the records, one JSON file a run; made if missing.
        work: folder for models while they are needed. An interrupted run goes on from its checkpoint there.
        console: where progress is told; default standard error.

    Returns:
        The records of all runs that are reported.

    Raises:
        ValueError: before any work, if a recipe cannot work or a record was made by other settings.
        Interrupted: after Ctrl-C; run it again to go on.
    """
    console = console or Console(stderr=True)
    results, work = Path(results), Path(work)
    _check(experiment, results)
    with new_file(results / PLAN_FILE, overwrite=True) as file:
        file.write_text(json.dumps(to_mapping(experiment), indent=2) + "\n", encoding="utf-8")
    make_towers(_towers_recipe(experiment, work), console)
    for arm in experiment.arms:
        _before(experiment, arm, work, console)
    records = []
    for point in points_of(experiment):
        for arm in experiment.arms:
            trial = ""
            if trials := trials_of(experiment, arm, point):
                tried = {run.trial: _perform(experiment, run, results, work, console) for run in trials}
                trial = min(tried, key=lambda name: tried[name]["validation_wer"])
                console.print(f"{arm} at {point}: {trial} of {len(tried)} trials")
            records += [_perform(experiment, r, results, work, console) for r in runs_of(experiment, arm, point, trial)]
    return records


def _check(experiment: Experiment, results: Path) -> None:
    """Every recipe can be read, and no record is of another experiment."""
    for point in points_of(experiment):
        for arm, chosen in experiment.arms.items():
            for run in [r for t in chosen.trials or [""] for r in runs_of(experiment, arm, point, t)]:
                recipe_of(experiment, run, results / "-")
            for run in trials_of(experiment, arm, point) or runs_of(experiment, arm, point):
                _known(experiment, run, results)


def _known(experiment: Experiment, run: Run, results: Path) -> dict[str, Any] | None:
    """A run's record, if there is one.

    Raises:
        ValueError: if it was made by other settings.
    """
    file = results / f"{run.name}.json"
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["run_hash"] != run_hash(experiment, run):
        raise ValueError(f"{file} was made by other settings than the experiment's; move it away to run it anew")
    return record


def _towers_recipe(experiment: Experiment, work: Path) -> FuseRecipe:
    """The recipe that makes the towers: what all runs share, so all unaligned data, whatever share is aligned."""
    common = Run(arm="", point="", trial="", seed=0, reported=False, changes=tuple(experiment.set))
    return recipe_of(experiment, common, work / "towers")


def _before(experiment: Experiment, arm: str, work: Path, console: Console) -> Path | None:
    """The model that an arm's runs start from, made if it is not there; `None` if they start from towers."""
    if (run := before_of(experiment, arm)) is None:
        return None
    output = work / run.name
    if not output.is_dir():
        console.print(f"before {arm}")
        halted = latest_checkpoint(working_folder(output)) is not None
        fuse(recipe_of(experiment, run, output), resume=halted, console=console)
    return output


def _perform(experiment: Experiment, run: Run, results: Path, work: Path, console: Console) -> dict[str, Any]:
    """One run: train, score, keep the record, drop the model."""
    if (known := _known(experiment, run, results)) is not None:
        return known
    started = time.time()
    output = work / run.name
    recipe = recipe_of(experiment, run, output, _before(experiment, run.arm, work, console))
    console.print(f"run {run.name}")
    trained = fuse(recipe, resume=latest_checkpoint(working_folder(output)) is not None, console=console)
    record: dict[str, Any] = {
        "run": asdict(run),
        "run_hash": run_hash(experiment, run),
        "recipe": trained["recipe"],
        "validation_wer": min((e["eval_wer"] for e in trained["history"] if "eval_wer" in e), default=None),
        "validation": [e for e in trained["history"] if "eval_wer" in e],
        **{k: trained[k] for k in ("steps", "best_step", "frozen_unchanged", "signatures", "train_loss")},
        **{k: trained[k] for k in ("perplexity_before", "perplexity_after", "parameters")},
        "seconds_training": trained["seconds"],
        "scores": _scores(experiment, recipe, output) if run.reported else {},
    }
    record |= {"seconds": round(time.time() - started, 1), "made_with": _made_with()}
    with new_file(results / f"{run.name}.json") as file:
        file.write_text(json.dumps(record, indent=1, default=float) + "\n", encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    return record


def _scores(experiment: Experiment, recipe: FuseRecipe, output: Path) -> dict[str, Any]:
    """Every task on the test split, with what was said and heard, and the judge's own errors."""
    rows = [r for r in read_rows(recipe.data.source, recipe.data.columns, TEST) if not isinstance(r, Document)]
    model, settings = load(output), generation_settings(output)
    scores: dict[str, Any] = {}
    for task in experiment.tasks:
        speaks = SHORT_NAMES.get(task, task).endswith("speech")
        judge = _judge(recipe) if speaks else None
        torch.manual_seed(recipe.seed)
        score = score_task(model, rows, task, judge=judge, settings=settings)
        scores[task] = {**score.summary(), "references": score.references, "hypotheses": score.hypotheses}
        if judge is not None:
            scores[task] |= yardsticks(model, rows, judge)
    return scores


def _judge(recipe: FuseRecipe) -> Recogniser:
    if recipe.judge is not None:
        return Recogniser.from_pretrained(recipe.judge)
    return judge_for(recipe.data.source, recipe.data.columns, split=recipe.data.train)


def _made_with() -> dict[str, Any]:
    """Packages and machine."""
    packages: Sequence[str] = ("zipper-lm", "torch", "transformers", "accelerate", "peft", "datasets", "numpy")
    device: Mapping[str, Any] = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **{p: version(p) for p in packages},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        **device,
    }
