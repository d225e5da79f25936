"""`zipper experiment`: every run of an experiment, a record each; what is there is not run again.

Several processes may work on one experiment, each on a device or a core of its own: a process holds a lock on what it
is at (the system lets go of it if the process dies), and the others take what is free.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from zipper_lm.data.document import Document
from zipper_lm.data.sources.readers import Rows, read_rows
from zipper_lm.data.tasks import parse_task
from zipper_lm.evaluation.forgetting import FORGETTING, Question, measure_forgetting, read_questions
from zipper_lm.evaluation.judges import Judge, load_judge
from zipper_lm.evaluation.scoring import SHORT_NAMES, counts_tokens, has_words, heard_again, score_task, yardsticks
from zipper_lm.experiments.plan import (
    BEFORE,
    Experiment,
    Run,
    before_of,
    before_place,
    cells_of,
    recipe_of,
    run_hash,
    runs_of,
    trials_of,
    whole,
)
from zipper_lm.experiments.records import keep, read_records, records_file
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.fuse import done, fuse
from zipper_lm.jobs.materials import check
from zipper_lm.jobs.pseudo_labels import labeller_recipe
from zipper_lm.jobs.recipes.checks import check_settings
from zipper_lm.jobs.recipes.reader import to_mapping
from zipper_lm.jobs.recipes.schema import DataRecipe, FuseRecipe
from zipper_lm.jobs.resume import latest_checkpoint
from zipper_lm.jobs.rows import DataSource
from zipper_lm.jobs.towers import make_towers
from zipper_lm.jobs.validation import judge_of
from zipper_lm.models.load import load
from zipper_lm.models.records import RUN_FILE, generation_settings
from zipper_lm.training.base import Diverged
from zipper_lm.utils.files import remove_folder, sweep
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.machine import made_with
from zipper_lm.utils.places import working_folder
from zipper_lm.utils.processes import several
from zipper_lm.utils.progress import bar, plain_console, warn

TEST = "test"
FITTED = "fitted"
"""In place of a judge's name: one is fitted on the data."""
LOCKS = "locks"
LOOK_AGAIN_SECONDS = 10.0


def run_experiment(
    experiment: Experiment, results: str | Path, work: str | Path, console: Console | None = None, only: str = "*"
) -> list[dict[str, Any]]:
    """Run what has no record yet.

    Args:
        experiment: what to do.
        results: file of the records, a line a run (see `packing`), with or without its ending; made if missing.
        work: folder for models while they are needed. An interrupted run goes on from its checkpoint there. Processes
            that share it, and `results`, share the runs.
        console: where progress is told; default standard error.
        only: a shell pattern of the names of runs, ``ARM--POINT--seedN``; the others, and trials that only they need,
            are left for another time.

    Returns:
        The records of the runs that `only` names; other processes' are waited for. One that diverged has no scores, and
        ``failed`` says why; the others go on.

    Raises:
        ValueError: before any work, if a recipe cannot work, a record was made by other settings, or no run has a name
            like `only`.
        Interrupted: after Ctrl-C; run it again to go on.
    """
    if several():
        raise ValueError("an experiment is not for accelerate launch or torchrun; start it several times instead")
    console = console or plain_console(stderr=True)
    results, work = records_file(results), Path(work)
    cells = _cells(experiment, only)
    _check(experiment, results)
    keep(results, plan=to_mapping(experiment))
    if work.is_dir():
        sweep(work)
    told: set[tuple[str, str]] = set()
    while True:
        _, there = read_records(results)
        found = [r for cell in cells for r in _cell(experiment, *cell, there, results, work, console, told)]
        records = [record for record in found if record is not None]
        if len(records) == len(found):
            return records
        time.sleep(LOOK_AGAIN_SECONDS)


def _cells(experiment: Experiment, only: str) -> list[tuple[str, str, list[int]]]:
    """Point, arm, and the places of its seeds, where runs have names like `only`.

    Raises:
        ValueError: if there are none.
    """
    cells, names = [], []
    for point, arm in cells_of(experiment):
        runs = runs_of(experiment, arm, point)
        names += [run.name for run in runs]
        if wanted := [place for place, run in enumerate(runs) if fnmatchcase(run.name, only)]:
            cells.append((point, arm, wanted))
    if not cells:
        raise ValueError(f"only: no run has a name like {only!r}; there are {', '.join(names)}")
    return cells


def _cell(
    experiment: Experiment,
    point: str,
    arm: str,
    wanted: list[int],
    there: Mapping[str, dict[str, Any]],
    results: Path,
    work: Path,
    console: Console,
    told: set[tuple[str, str]],
) -> list[dict[str, Any] | None]:
    """Trials, choice and wanted runs of one arm at one point. `None` stands for what waits for another process.

    What is `there` already is not looked for again.
    """
    trial = ""
    if trials := trials_of(experiment, arm, point):
        tried = {run.trial: _perform(experiment, run, there, results, work, console) for run in trials}
        scores = {name: record["validation_score"] for name, record in tried.items() if record is not None}
        if len(scores) < len(tried):
            return [None]
        trial = min(scores, key=lambda name: math.inf if scores[name] is None else scores[name])
        if (point, arm) not in told:
            console.print(f"{arm} at {point}: {trial} of {len(tried)} trials")
            told.add((point, arm))
    runs = runs_of(experiment, arm, point, trial)
    return [_perform(experiment, runs[place], there, results, work, console) for place in wanted]


def _check(experiment: Experiment, results: Path) -> None:
    """Every recipe can work, trials can be told apart, what is scored is there, and records are of this experiment.

    Raises:
        ValueError: if not.
    """
    sources = {}
    _, there = read_records(results)
    for point, arm in cells_of(experiment):
        if (before := before_of(experiment, arm)) is not None:
            check_settings(recipe_of(experiment, before, ""))
        for run in trials_of(experiment, arm, point):
            recipe = recipe_of(experiment, run, "")
            check_settings(recipe)
            if recipe.data.validation is None:
                raise ValueError(f"arm {arm!r} has trials, but data.validation is null: nothing to choose by")
            _known(experiment, [run], there, results)
        for seed in range(len(experiment.seeds)):
            runs = [runs_of(experiment, arm, point, trial)[seed] for trial in experiment.arms[arm].trials or [""]]
            recipe = recipe_of(experiment, runs[0], "")
            check_settings(recipe)
            for task in experiment.tasks:
                parse_task(SHORT_NAMES.get(task, task), list(recipe.towers))
            sources[recipe.data.source, recipe.data.revision, recipe.normaliser] = recipe.data
            _known(experiment, runs, there, results)
    if experiment.forgetting:
        _asked(experiment)
    if experiment.second_judge not in ("", FITTED):
        load_judge(experiment.second_judge)
    for (_, _, normaliser), data in sources.items():
        rows = _test_rows(data)
        for number, row in enumerate(rows):
            if not isinstance(row, Document) and row.get("text") is not None and not has_words(row, normaliser):
                raise ValueError(f"{rows.where(number)}: its text has no words, so no error rate of it is defined")


def _test_rows(data: DataRecipe) -> Rows:
    """The split that is for scoring runs alone."""
    return read_rows(data.source, data.columns, TEST, revision=data.revision)


def _known(
    experiment: Experiment, runs: Sequence[Run], there: Mapping[str, dict[str, Any]], results: Path
) -> dict[str, Any] | None:
    """The record of a run, if there is one.

    Args:
        experiment: what they are of. runs: of one name; the record is one of theirs. there: records by name. results:
            the file that they are from.

    Raises:
        ValueError: if it was made by other settings.
    """
    if (record := there.get(runs[0].name)) is None:
        return None
    same = [run for run in runs if run_hash(experiment, run) == record["run_hash"]]
    now = to_mapping(recipe_of(experiment, (same or runs)[0], ""))
    if not same or not still_holds(record["recipe"], now):
        settings = "; ".join(differences(record["recipe"], now)) or "tasks, or what it started from"
        raise ValueError(
            f"{results}: {runs[0].name} was made by other settings than the experiment's ({settings}); take its line "
            "out to run it anew, or name another file (--results)"
        )
    return record


def still_holds(recorded: Any, now: Any) -> bool:
    """Whether all that a record's recipe says is so now. A setting that was new since then may be there; a default that
    was changed since then is another setting, though no hash shows it."""
    if isinstance(recorded, dict):
        return isinstance(now, dict) and all(k in now and still_holds(v, now[k]) for k, v in recorded.items())
    if isinstance(recorded, list) and isinstance(now, list):  # such as zips, each a mapping
        return len(recorded) == len(now) and all(map(still_holds, recorded, now))
    return bool(recorded == now)


def differences(recorded: Any, now: Any, key: str = "") -> list[str]:
    """Where a recipe is not as recorded, as ``dotted.key: recorded, now ...``. A setting that was new since then is no
    difference, nor is the place of a tower that is made on the way: other settings decide it, and are told."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        found = []
        for name, value in recorded.items():
            if not (name == "source" and recorded.get("pretrain") and now.get("pretrain")):
                found += differences(value, now.get(name), f"{key}.{name}" if key else name)
        return found
    return [] if still_holds(recorded, now) else [f"{key}: {recorded}, now {now}"]


def trained(recipe: FuseRecipe, work: Path, console: Console) -> dict[str, Any]:
    """The record of a fusion: made, gone on with, or, if only scoring was cut off, read. Its towers, and the model that
    writes its pseudo-labels, are made first; a process that wants the same ones waits.

    Args:
        recipe: of it. work: folder of the locks that such processes share. console: where progress is told.

    Raises:
        ValueError: as `fuse`. Interrupted: after Ctrl-C; call it again to go on.
    """
    if (record := done(recipe)) is not None:
        return record
    begun = latest_checkpoint(working_folder(recipe.output)) is not None
    towers = whole(recipe)
    with _alone(work, "towers", console):
        check(recipe, begun)  # before its towers, which take long
        halted = [n for n, t in towers.towers.items() if t.pretrain and latest_checkpoint(working_folder(t.source))]
        make_towers(towers, console, halted)
    if recipe.pseudo_labels is not None:
        first = labeller_recipe(recipe)
        with _alone(work, f"labeller-{Path(first.output).name}", console):
            if not Path(first.output).is_dir():
                trained(first, work, console)
    return fuse(recipe, resume=begun, console=console)


def _made_so(recipe: FuseRecipe) -> bool:
    """Whether a model is there that was made by this recipe, in whatever folder: it may have been moved."""
    file = Path(recipe.output) / RUN_FILE
    if not file.is_file():
        return False
    recorded, now = read_mapping(file)["recipe"], to_mapping(recipe)
    return not differences({**recorded, "output": now["output"]}, now)


def _lock(work: Path, name: str) -> FileLock:
    """For a block that no other process shall be in at the same time. Its file stays: to remove it is a race."""
    folder = work / LOCKS
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")


@contextmanager
def _alone(work: Path, name: str, console: Console) -> Iterator[None]:
    """Whatever several runs need is made by one process; the others wait, and say so."""
    lock = _lock(work, name)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        console.print(f"waiting for another process: {name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _perform(
    experiment: Experiment,
    run: Run,
    there: Mapping[str, dict[str, Any]],
    results: Path,
    work: Path,
    console: Console,
) -> dict[str, Any] | None:
    """One run: train, score, keep the record, drop the model. `None` if another process is at it."""
    if (known := _known(experiment, [run], there, results)) is not None:
        remove_folder(work / run.name)  # where that was cut off
        return known
    lock = _lock(work, run.name)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    try:
        _, now = read_records(results)  # another process may have made it meanwhile
        return _known(experiment, [run], now, results) or _tried(experiment, run, results, work, console)
    finally:
        lock.release()


def _tried(experiment: Experiment, run: Run, results: Path, work: Path, console: Console) -> dict[str, Any]:
    """`_performed`; the record of a run that diverged says so, and has no scores."""
    try:
        return _performed(experiment, run, results, work, console)
    except Diverged as error:
        console.print(f"run {run.name} failed: {error}", style="red", soft_wrap=True)
        record: dict[str, Any] = {
            "run": asdict(run),
            "run_hash": run_hash(experiment, run),
            "recipe": to_mapping(recipe_of(experiment, run, "")),
            "failed": str(error),
            "validation_score": None,
            "scores": {},
            "made_with": made_with(),
        }
        return keep(results, record=record)[run.name]


def _performed(experiment: Experiment, run: Run, results: Path, work: Path, console: Console) -> dict[str, Any]:
    started = time.monotonic()
    if (before := before_of(experiment, run.arm)) is not None:
        place = before_place(experiment, before, work)
        with _alone(work, f"{BEFORE}-{Path(place).name}", console):
            recipe = recipe_of(experiment, before, place, work)
            if not _made_so(recipe):
                trained(recipe, work, console)
    output = work / run.name
    recipe = recipe_of(experiment, run, output, work)
    console.print(f"run {run.name}")
    made = trained(recipe, work, console)
    # Errors where the tasks can be scored, else the loss: what `fuse` keeps the best checkpoint by.
    validation = [e for e in made["history"] if "eval_wer" in e or "eval_loss" in e]
    seen = [e.get("eval_wer", e.get("eval_loss")) for e in validation]
    record: dict[str, Any] = {
        "run": asdict(run),
        "run_hash": run_hash(experiment, run),
        "recipe": to_mapping(recipe_of(experiment, run, "")),  # as hashed: without the places of this machine
        "validation_score": min((score for score in seen if score is not None), default=None),
        "validation": validation,
        **{k: made[k] for k in ("steps", "best_step", "frozen_unchanged", "signatures", "train_loss")},
        **{k: made[k] for k in ("perplexity_before", "perplexity_after", "parameters")},
        "seconds_training": made["seconds"],
        **(_measured(experiment, recipe, output, console) if run.reported else {"scores": {}}),
    }
    here = made_with()  # a model may have come from another machine, where its scores were cut off
    record |= {"seconds": round(time.monotonic() - started, 1), "made_with": made["made_with"]}
    if run.reported and record["made_with"] != here:
        record["scored_with"] = here
    kept = keep(results, record=record)[run.name]
    remove_folder(output)
    return kept


def _measured(experiment: Experiment, recipe: FuseRecipe, output: Path, console: Console) -> dict[str, Any]:
    """What is known of a run's model: its scores, and what its text decoder has forgotten."""
    model = load(output, trust_remote_code=recipe.trust_remote_code)
    found: dict[str, Any] = {"scores": _scores(experiment, recipe, model, generation_settings(output), console)}
    if experiment.forgetting:
        texts, questions = _asked(experiment)
        try:
            found[FORGETTING] = measure_forgetting(model, texts, questions, folder=output).summary()
        except ValueError as error:  # a small tokenizer may lack letters: its run was long, and has scores
            warn(console, "what is forgotten is not measured", error)
            found[FORGETTING] = {"not_measured": str(error)}
    return found


def _asked(experiment: Experiment) -> tuple[list[str], list[Question]]:
    """Text and questions on which forgetting is measured."""
    rows = read_rows(experiment.forgetting, split=TEST)
    texts = [row["text"] for row in rows if not isinstance(row, Document) and isinstance(row.get("text"), str)]
    if not texts:
        raise ValueError(f"forgetting: {experiment.forgetting} has no text in split {TEST!r}")
    return texts, read_questions(experiment.questions) if experiment.questions else read_questions()


def _scores(
    experiment: Experiment, recipe: FuseRecipe, model: Writer, settings: dict[str, dict[str, Any]], console: Console
) -> dict[str, Any]:
    """Every task on the test split, with what was said and heard, and the judges' own errors."""
    rows = [row for row in _test_rows(recipe.data) if not isinstance(row, Document)]
    assert model.processor is not None
    scores: dict[str, Any] = {}
    for task in experiment.tasks:
        ends_in = parse_task(SHORT_NAMES.get(task, task)).targets[-1]
        judge = None
        if ends_in != "text" and not counts_tokens(ends_in, model.processor.codecs.get(ends_in)):
            judge = _judge(recipe.judge, recipe.data, ends_in, console)
        torch.manual_seed(recipe.seed)
        how: dict[str, Any] = {"judge": judge, "settings": settings, "normaliser": recipe.normaliser}
        with bar(console, f"scoring {task}") as advance:
            advance(0, len(rows))
            score = score_task(model, rows, task, progress=advance, **how)
        scores[task] = {**score.summary(), "references": score.references, "hypotheses": score.hypotheses}
        if judge is not None:
            scores[task] |= {"judge": judge.digest(), **yardsticks(model, rows, judge, ends_in, recipe.normaliser)}
        if judge is not None and experiment.second_judge:
            named = None if experiment.second_judge == FITTED else experiment.second_judge
            second = _judge(named, recipe.data, ends_in, console)
            heard = heard_again(score, second)
            scores[task]["second_judge"] = {
                **heard,
                "judge": second.digest(),
                **yardsticks(model, rows, second, ends_in, recipe.normaliser),
            }
    return scores


def _judge(named: str | None, data: DataRecipe, modality: str, console: Console) -> Judge:
    """The one that is named, else one that is fitted on the originals."""
    return load_judge(named) if named is not None else judge_of(DataSource(data).originals, modality, console)
