"""`zipper fuse`: the main job. Towers (made first if the recipe says so), aligned data, training, a checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from torch import nn

from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.failures import Failure, before_training, diagnose, unimodal_perplexity
from zipper_lm.jobs.materials import Materials, Plan, check, gather
from zipper_lm.jobs.pseudo_labels import labeller_recipe
from zipper_lm.jobs.recipes.reader import recipe_hash, to_mapping
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.jobs.record import run_record, write_run
from zipper_lm.jobs.resume import (
    clear_done,
    forget_scores,
    keep_recipe,
    latest_checkpoint,
    scored_otherwise,
)
from zipper_lm.jobs.start import check_kind
from zipper_lm.jobs.validation import try_settings
from zipper_lm.models.load import load
from zipper_lm.models.records import RUN_FILE
from zipper_lm.training.beside import task_pairs
from zipper_lm.training.callbacks import StopOnInterrupt, callbacks_of, train_with_bar
from zipper_lm.training.trainer import ZipperTrainer
from zipper_lm.utils.files import remove_folder
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.places import cache_folder, working_folder
from zipper_lm.utils.processes import from_main, is_main, main_console, naming_lost_peers, wait
from zipper_lm.utils.progress import warn
from zipper_lm.utils.shards import gathered


@naming_lost_peers()
def fuse(recipe: FuseRecipe, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run a recipe from its towers to a saved model.

    Args:
        recipe: what to do.
        resume: go on from the newest checkpoint of an interrupted run with the same recipe. One that is done already
            has nothing left to do; what it may have left beside its output is removed.
        console: where progress is told; `None` is standard error.

    Returns:
        The run's record, also written to ``run.json`` beside the model: recipe and its hash, scores on the validation
        split, losses, gates, failures that show, perplexities, seconds, versions and machine.

    Raises:
        ValueError: for anything in the recipe that cannot work, before training starts.
        Interrupted: after Ctrl-C or SIGTERM; a checkpoint has been written.
        PeerLost: if another process died or hung.
    """
    started = time.monotonic()
    check_kind(recipe)
    if resume and not recipe.overwrite and (record := done(recipe)) is not None:  # else it may be an earlier one
        return record
    plan = check(recipe, resume)
    given, recipe = recipe, plan.recipe
    console = console or main_console()  # after the arguments, which say how to connect
    materials = gather(plan, console, lambda: make_labeller(given, console, resume))
    model, validation = materials.model, materials.validation
    trainer = make_trainer(plan, materials)  # which puts the model where it is trained
    try:
        try_settings(model, validation or materials.rows, recipe.generation, materials.scorer)
        trainer.keep_prefixes(console)
    except ValueError:
        if plan.checkpoint is None and is_main():
            remove_folder(plan.working)
        raise
    follow(plan, console)
    foreseen: list[Failure] = []
    if validation and recipe.data.buffer is None:  # of rows that stream by the first ones alone are known
        foreseen = before_training(model, plan.trained, materials.rows, validation)
    for failure in foreseen:
        warn(console, failure.name, failure.message)
    before = unimodal_perplexity(model, validation)
    loss = train(trainer, plan, console)
    model.eval()
    size = recipe.training.batch_size
    with gathered(cast(nn.Module, model)):
        found = diagnose(model, plan.trained, size, materials.rows, validation, before) if validation else []
        for failure in found:
            warn(console, failure.name, failure.message)
        record = run_record(plan, materials, trainer, loss, before, [*foreseen, *found])
        record["seconds"] = round(time.monotonic() - started, 1)
        if is_main():
            write_run(plan, model, record)
        wait()
    return record


def done(recipe: FuseRecipe) -> dict[str, Any] | None:
    """The record of a run by this recipe that is done, of which nothing is left beside its output then."""
    file = Path(recipe.output) / RUN_FILE
    if not file.is_file():
        return None
    record = read_mapping(file)
    if record.get("recipe_hash") != recipe_hash(to_mapping(recipe)):
        return None
    clear_done(recipe.output)
    return record


def follow(plan: Plan, console: Console) -> None:
    """Let the checkpoint to go on from forget its best score, if the recipe is scored otherwise from now on."""
    changed = from_main([] if plan.checkpoint is None else scored_otherwise(plan.working, plan.given))
    if not changed:
        return
    warn(console, "the best score so far is forgotten", f"{', '.join(changed)} changed since it was found")
    if plan.arguments.should_save:  # the main process, or one on each machine
        forget_scores(plan.working)
    if is_main():
        keep_recipe(plan.working, plan.plain)
    wait()


def make_trainer(plan: Plan, materials: Materials) -> ZipperTrainer:
    """What trains the model of a run, as its recipe says."""
    training = plan.recipe.training
    return ZipperTrainer(
        materials.model,
        plan.arguments,
        materials.mixture,
        corrupt=training.corrupt,
        history_dropout=training.history_dropout,
        tower_learning_rate=training.tower_learning_rate,
        guided=task_pairs("guided_attention", training.guided_attention, plan.tasks),
        ctc=task_pairs("ctc", training.ctc, plan.tasks),
        aligned=task_pairs("aligned_attention", training.aligned_attention, plan.tasks),
        forward_sum=task_pairs("forward_sum", training.forward_sum, plan.tasks),
        fade_out=training.fade_out,
        packing=training.packing,
        prefix_cache=training.prefix_cache,
        prefix_folder=cache_folder() / "prefixes",
        score=materials.scorer,
        callbacks=callbacks_of(training),
    )


def train(trainer: ZipperTrainer, plan: Plan, console: Console) -> float:
    """Train a run's model; returns the mean training loss.

    Args:
        trainer: from `make_trainer`. plan: says what to go on from. console: for the bar.

    Raises:
        Interrupted: after Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    stop = StopOnInterrupt()
    trainer.add_callback(stop)
    try:
        result = train_with_bar(trainer, console, "fusing", str(plan.checkpoint) if plan.checkpoint else None)
    finally:
        stop.release()
    stop.check(trainer.state.global_step)
    return result.training_loss


def make_labeller(recipe: FuseRecipe, console: Console, resume: bool = False) -> Writer | None:
    """The model that writes the recipe's pseudo-labels, fused first if it is not there yet; `None` without any.

    Args:
        recipe: the fusion's, as it was given; its towers are there. console: where progress is told.
        resume: go on with it from its checkpoint, if it has one.
    """
    if recipe.pseudo_labels is None:
        return None
    first = labeller_recipe(recipe)
    if not Path(first.output).is_dir():
        console.print(f"fusing the model that writes pseudo-labels -> {first.output}")
        begun = latest_checkpoint(working_folder(first.output)) is not None or first.pseudo_labels is not None
        fuse(first, resume=resume and begun, console=console)
    return load(first.output, trust_remote_code=first.trust_remote_code)
