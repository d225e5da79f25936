"""What a fusion is made of, gathered once: what is wrong with any of it is said before the long work begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed

from zipper_lm.data.broken import Broken
from zipper_lm.data.buffered import BufferedDocuments
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.encoding import encode_rows, encoded_modalities, token_counts
from zipper_lm.data.mixture import TaskMixture, joiners
from zipper_lm.data.prepared import TRAIN
from zipper_lm.data.sources.readers import Stream
from zipper_lm.data.tasks import Task
from zipper_lm.evaluation.judges import Judge, load_judge
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.agreement import check_codecs
from zipper_lm.jobs.pseudo_labels import (
    Unlabelled,
    check_labeller,
    label,
    mixed,
    open_unlabelled,
    read_labels,
    write_labels,
)
from zipper_lm.jobs.recipes.checks import check_lengths, check_recipe, joined_tasks, stream_limits
from zipper_lm.jobs.recipes.reader import to_mapping
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.jobs.resume import begin, check_data, check_working, latest_checkpoint, newest_from
from zipper_lm.jobs.rows import DataSource, Opened, measure_stretch
from zipper_lm.jobs.start import origin, with_towers
from zipper_lm.jobs.towers import build_model, make_towers, missing_towers
from zipper_lm.jobs.validation import Scorer, judge_of
from zipper_lm.training.arguments import evaluation_arguments, training_arguments
from zipper_lm.training.base import check_step_size, documents_of_a_step, step_size
from zipper_lm.training.parameters import describe_parameters
from zipper_lm.utils.places import working_folder
from zipper_lm.utils.processes import is_main, wait

FIRST = 256
"""Rows that lengths are measured on, settings tried, and failures sought, where not all are encoded before training."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe that was checked, and where its run stands.

    Attributes:
        recipe: what to do, with its towers. given: the same as the user gave it, which records keep.
        tasks: by template. trained: templates of those that have a weight.
        working: the run's folder until it is done. arguments: of the Trainer.
        checkpoint: to go on from; `None` begins anew. halted: towers whose pre-training goes on from theirs.
    """

    recipe: FuseRecipe
    given: FuseRecipe
    tasks: dict[str, Task]
    trained: list[str]
    working: Path
    arguments: TrainingArguments
    checkpoint: Path | None
    halted: list[str]

    @property
    def plain(self) -> dict[str, Any]:
        """The recipe as it was given, as plain values."""
        return to_mapping(self.given)


@dataclass(kw_only=True)
class Materials:
    """What is trained, and on what.

    Attributes:
        model: fresh, or as its towers were left. mixture: the documents that it is trained on.
        rows: encoded, those with pseudo-labels among them; with `data.buffer`, the first ones.
        validation: encoded. labelled: rows with pseudo-labels.
        pairs: how many rows are aligned. broken: what could not be read. scorer: if there is anything to score.
    """

    model: Writer
    mixture: Dataset[Document]
    rows: Sequence[Any]
    validation: Sequence[Any]
    labelled: list[dict[str, Segment]]
    pairs: int
    broken: Broken
    scorer: Scorer | None


def check(recipe: FuseRecipe, resume: bool = False) -> Plan:
    """What can be known of a run without data and towers.

    Args:
        recipe: what to do. resume: go on from the newest checkpoint.

    Raises:
        ValueError: naming field and value; if there is nothing to go on from, or something in the way.
    """
    given, working = recipe, working_folder(recipe.output)
    recipe = with_towers(given, newest_from(working, given.start) if resume else None)
    tasks = check_recipe(recipe)
    halted: list[str] = []
    if resume:
        halted = [n for n in missing_towers(recipe) if latest_checkpoint(working_folder(recipe.towers[n].source))]
    # Of a run with pseudo-labels, the model that writes them may be what was interrupted, or what is done.
    here = resume and not halted and (recipe.pseudo_labels is None or latest_checkpoint(working) is not None)
    checkpoint = check_working(working, given, resume=here, overwrite=recipe.overwrite)
    evaluation = evaluation_arguments(recipe.training, recipe.data.validation, "eval_wer")
    arguments = training_arguments(recipe.training, working, recipe.seed, **evaluation)
    if checkpoint is not None:
        check_step_size(step_size(checkpoint), arguments)
    return Plan(
        recipe=recipe,
        given=given,
        tasks=tasks,
        trained=[template for template in tasks if recipe.tasks[template] > 0],
        working=working,
        arguments=arguments,
        checkpoint=checkpoint,
        halted=halted,
    )


def gather(plan: Plan, console: Console, make_labeller: Callable[[], Writer | None]) -> Materials:
    """Open judge and data, make the towers that are not there, build the model, encode the rows, write pseudo-labels.

    Args:
        plan: what to do. console: where progress is told.
        make_labeller: gives the model that writes pseudo-labels, once the towers are there.

    Raises:
        ValueError: for anything that cannot work.
    """
    recipe, tasks, checkpoint = plan.recipe, plan.tasks, plan.checkpoint
    judge = load_judge(recipe.judge) if recipe.judge is not None else None
    named = {m for task in tasks.values() for m in task.modalities}
    source = DataSource(recipe.data)
    source.check_modalities(named)
    opened, held_out = source.open(TRAIN), source.validation_rows()
    data = source.identity(opened, held_out)
    if checkpoint is not None:
        check_data(plan.working, data)
    unlabelled = open_unlabelled(recipe) if recipe.pseudo_labels is not None else None
    make_towers(recipe, console, plan.halted)
    labeller = make_labeller() if checkpoint is None else None
    set_seed(recipe.seed)
    model = build_model(recipe, checkpoint)
    assert model.processor is not None
    check_codecs(plan.given, model.processor.codecs)
    if plan.arguments.device.type == "cuda":
        model.processor.to(plan.arguments.device)
    source.check_codecs(model.processor.codecs)
    joined = sorted({m for template in joined_tasks(recipe) for m in tasks[template].modalities})
    how = joiners(model.processor.codecs, joined)
    console.print(describe_parameters(model))
    broken = Broken(recipe.data.broken_limit)
    raw: Iterable[Any] = source.training_rows(recipe.seed, opened, broken)
    if recipe.data.buffer is not None:
        _check_workers(plan, opened)
        raw = list(islice(raw, FIRST))  # the others are encoded when their turn comes
    aligned = _encoded(model, raw, named, broken)
    validation = _encoded(model, held_out, named, broken)
    labelled: list[dict[str, Segment]] = []
    rows = aligned
    if recipe.pseudo_labels is not None and unlabelled is not None:
        labelled = _labelled(plan, model, labeller, unlabelled, broken)
        del labeller
        told = f"pseudo-labels: {len(labelled)} rows of {recipe.pseudo_labels.task}, beside {len(aligned)} pairs"
        console.print(told)
        rows = mixed(aligned, labelled, recipe.pseudo_labels.share)
    if broken.items:
        console.print(broken.told(), style="yellow")
    if isinstance(model, ZippedTowers) and recipe.start is None:  # else weights have learned where tokens stand
        measure_stretch(model, rows)
    mixture: Dataset[Document]
    if recipe.data.buffer is not None:
        mixture = _buffered(plan, model, opened, named)
    else:
        mixture = TaskMixture(
            rows,
            recipe.tasks,
            seed=recipe.seed,
            interleave=recipe.training.interleave,
            join=recipe.training.join,
            how=how,
            towers=model.names,
        )
    together = (2 if recipe.training.interleave else 1) * (2 if how else 1)
    lengths = chain(token_counts(rows), token_counts(validation))
    check_lengths(model, lengths, [tasks[template] for template in plan.trained], together)
    scorer = _scorer(plan, model, validation, judge, source, console) if validation else None
    if checkpoint is None and is_main():
        begin(plan.working, plan.plain, data, None if recipe.start is None else origin(recipe.start))
        if labelled:
            write_labels(plan.working, labelled)
    wait()
    return Materials(
        model=model,
        mixture=mixture,
        rows=rows,
        validation=validation,
        labelled=labelled,
        pairs=len(opened) if recipe.data.buffer is not None and isinstance(opened, Sized) else len(aligned),
        broken=broken,
        scorer=scorer,
    )


def _check_workers(plan: Plan, opened: Opened) -> None:
    """Raise `ValueError` for workers that would each get a part of a stream: `datasets` deals them its shards."""
    workers = plan.arguments.dataloader_num_workers
    if isinstance(opened, Stream) and workers:
        raise ValueError(
            f"training.arguments: dataloader_num_workers={workers} must be 0 with data.streaming and data.buffer"
        )


def _buffered(plan: Plan, model: Writer, opened: Opened, named: set[str]) -> BufferedDocuments:
    recipe = plan.recipe
    assert model.processor is not None
    assert recipe.data.buffer is not None
    return BufferedDocuments(
        opened,
        recipe.tasks,
        model.processor,
        encoded_modalities(opened, named, model.names),
        seed=recipe.seed,
        buffer=recipe.data.buffer,
        count=recipe.training.steps * documents_of_a_step(plan.arguments),
        limits=stream_limits(model),
    )


def _encoded(model: Writer, rows: Iterable[Any], named: set[str], broken: Broken) -> Sequence[Any]:
    assert model.processor is not None
    return encode_rows(model.processor, rows, encoded_modalities(rows, named, model.names), broken)


def _labelled(
    plan: Plan, model: Writer, labeller: Writer | None, unlabelled: Unlabelled, broken: Broken
) -> list[dict[str, Segment]]:
    """Rows with pseudo-labels: written now, or those that the run to go on with began with."""
    recipe = plan.recipe
    if labeller is None:
        return read_labels(plan.working)
    assert recipe.pseudo_labels is not None
    task, rows, source = unlabelled
    check_labeller(labeller, model, task, source)
    return label(labeller, model, task, rows, recipe.pseudo_labels, recipe.generation, broken)


def _scorer(
    plan: Plan, model: Writer, validation: Sequence[Any], judge: Judge | None, source: DataSource, console: Console
) -> Scorer:
    recipe = plan.recipe
    size, settings = recipe.training.batch_size, recipe.generation
    best: dict[str, Any] = {"best_of": recipe.best_of, "best_by": recipe.best_by, "normaliser": recipe.normaliser}
    scorer = Scorer(model, validation, plan.trained, recipe.scored, settings=settings, batch_size=size, **best)
    scorer.find_judges(model, judge, partial(judge_of, source.originals), console)
    if not scorer.tasks:
        plan.arguments.metric_for_best_model = "eval_loss"
    return scorer
