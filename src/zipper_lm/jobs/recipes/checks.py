"""What can be found out about a fusion before its long work begins."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zipper_lm.data.mixture import read_weights
from zipper_lm.data.sources.readers import PREPARED_FILE
from zipper_lm.data.tasks import Task, parse_task
from zipper_lm.fusion.config import check_loss_weights
from zipper_lm.fusion.limits import check_length, position_limit
from zipper_lm.generation.settings import generation_config
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.recipes.schema import FuseRecipe, PseudoLabelsRecipe
from zipper_lm.training.beside import task_pairs
from zipper_lm.training.corruption import share_of
from zipper_lm.training.prefix_cache import modes_of
from zipper_lm.training.recipe import BESIDE
from zipper_lm.utils.arguments import check_devices
from zipper_lm.utils.files import check_apart, check_output, holding
from zipper_lm.utils.hub import CONFIG_FILE
from zipper_lm.utils.places import working_folder

_OUTPUTS = (CONFIG_FILE, PREPARED_FILE)
"""Files of which one is in whatever is written here."""


def check_recipe(recipe: FuseRecipe) -> dict[str, Task]:
    """Whatever can be checked without data and towers; returns the tasks by template.

    Raises:
        ValueError: naming field and value.
    """
    check_output(recipe.output, recipe.overwrite)
    check_sources(recipe.output, recipe)
    for tower in recipe.towers.values():
        if tower.pretrain is not None and not Path(tower.source).is_dir():
            check_output(tower.source)
    if recipe.pseudo_labels is not None:
        _check_place(recipe, recipe.pseudo_labels)
    return check_settings(recipe)


def check_sources(output: str | Path, recipe: FuseRecipe, working: Path | None = None) -> None:
    """Raise `ValueError` if a run would replace what a recipe reads: its towers, codecs, data, judge, the model that it
    starts from or that writes pseudo-labels, or a folder in them that is no output.

    Args:
        output: of the run. recipe: says what is read.
        working: emptied before the run, and gone after it; `None` is that of a training.
    """
    read: dict[str, Any] = {"data.source": recipe.data.source, "start": recipe.start, "judge": recipe.judge}
    if recipe.data.clips is not None:
        read["data.clips.source"] = recipe.data.clips.source
    if recipe.pseudo_labels is not None:
        wanted = recipe.pseudo_labels
        read |= {"pseudo_labels.source": wanted.source, "pseudo_labels.model": wanted.model or None}
    for name, tower in recipe.towers.items():
        read[f"tower {name!r}"] = tower.source or None
        if recipe.start is None:  # whose codecs lie with it, and in the checkpoint of a run that goes on
            read[f"the codec of tower {name!r}"] = tower.codec and tower.codec.source
        if tower.pretrain is not None and (alone := tower.pretrain.data) is not None:
            read[f"the unaligned data of tower {name!r}"] = alone.source
            read[f"the clips of tower {name!r}"] = alone.clips and alone.clips.source
    check_apart(output, read, holding(*_OUTPUTS))
    check_apart(working_folder(output) if working is None else working, read)
    start = Path(recipe.start or "").resolve()
    if recipe.start is not None and start.is_dir() and start in Path(output).expanduser().resolve().parents:
        raise ValueError(f"output {str(output)!r} lies in start, {recipe.start!r}, which stays as it is")


def check_settings(recipe: FuseRecipe) -> dict[str, Task]:
    """That settings go together, wherever things are; returns the tasks by template.

    Raises:
        ValueError: naming field and value.
    """
    names = list(recipe.towers)
    tasks = {template: parse_task(template, names) for template in recipe.tasks}
    by_tower = {"loss_weights": recipe.loss_weights, "generation": recipe.generation}
    noise = {f"training.{field}": getattr(recipe.training, field) for field in ("corrupt", "history_dropout")}
    for field, named in (by_tower | noise).items():
        if isinstance(named, dict) and (unknown := sorted(set(named) - set(names))):
            raise ValueError(f"{field} names {unknown}, but the towers are {names}")
    check_loss_weights(recipe.loss_weights, names)
    for name, tower in recipe.towers.items():
        dtype = (tower.config or {}).get("dtype")
        if tower.train == "full" and dtype == "float16":
            raise ValueError(f"towers.{name}.config: dtype float16 is too narrow for training (train: full)")
    read_weights(recipe.tasks, names)
    if recipe.scored is not None:
        trained = [template for template, weight in recipe.tasks.items() if weight > 0]
        if unknown := sorted(set(recipe.scored) - set(trained)):
            raise ValueError(f"scored names {unknown}, but the tasks with a weight above 0 are {trained}")
        if not recipe.scored:
            raise ValueError("scored: name at least one task, or leave it out for all")
    join = recipe.training.join
    if isinstance(join, dict) and (unknown := sorted(set(join) - set(tasks))):
        raise ValueError(f"training.join names {unknown}, but the tasks are {list(tasks)}")
    for template in joined_tasks(recipe):
        if tasks[template].repeats:
            raise ValueError(f"training.join cannot be used with {template!r}, which names a modality twice")
    _check_devices(recipe)
    _check_prefix_cache(recipe, tasks)
    for field in BESIDE:
        if task_pairs(field, getattr(recipe.training, field), tasks) and recipe.architecture != "zipper":
            raise ValueError(f"training.{field} is for zips; architecture {recipe.architecture!r} has none")
    for name, settings in recipe.generation.items():
        try:
            generation_config(name, settings)
        except ValueError as error:
            raise ValueError(f"generation.{name}: {error}") from error
    if recipe.pseudo_labels is not None:
        _check_pseudo_labels(recipe, recipe.pseudo_labels, tasks)
    return tasks


def _check_devices(recipe: FuseRecipe) -> None:
    """Towers apart: devices that are here, one process, and zips."""
    apart = {name: tower.device for name, tower in recipe.towers.items() if tower.device is not None}
    if not apart:
        return
    check_devices("towers", apart)
    field = f"towers.{next(iter(apart))}.device={next(iter(apart.values()))!r}"
    if recipe.architecture != "zipper":
        raise ValueError(f"{field} is for towers; architecture {recipe.architecture!r} has one decoder")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or recipe.training.arguments.get("fsdp"):
        raise ValueError(f"{field}: towers apart are trained in one process: leave it out, or start one, without fsdp")


def _check_prefix_cache(recipe: FuseRecipe, tasks: Mapping[str, Task]) -> None:
    """What can be known of `training.prefix_cache` without towers: `towers_kept` knows the rest."""
    training = recipe.training
    if training.prefix_cache is None:
        return
    if recipe.architecture != "zipper":
        raise ValueError(f"training.prefix_cache is for zips; architecture {recipe.architecture!r} has none")
    names = list(modes_of(training.prefix_cache, recipe.towers, training.corrupt))
    anew = "puts streams together anew in each epoch, so that what was kept would not be read again"
    if training.interleave:
        raise ValueError(f"training.interleave={training.interleave} with training.prefix_cache: it {anew}")
    for template, task in tasks.items():
        share = share_of(training.join, template)
        if share and set(names) & set(task.modalities):
            raise ValueError(f"training.join={share} of {template!r} with training.prefix_cache: it {anew}")
        if several := [name for name in names if task.modalities.count(name) > 1]:
            raise ValueError(f"task {template!r} with training.prefix_cache: it names {several} twice, and {anew}")


def joined_tasks(recipe: FuseRecipe) -> list[str]:
    """The tasks whose rows are joined end to end, some of them."""
    return [template for template in recipe.tasks if share_of(recipe.training.join, template)]


def _check_place(recipe: FuseRecipe, wanted: PseudoLabelsRecipe) -> None:
    if not wanted.model:
        raise ValueError("pseudo_labels.model: name the folder of the model that writes, or where to make it")
    if not Path(wanted.model).is_dir():
        check_output(wanted.model)
        check_sources(wanted.model, replace(recipe, pseudo_labels=replace(wanted, model="")))


def _check_pseudo_labels(recipe: FuseRecipe, wanted: PseudoLabelsRecipe, tasks: Mapping[str, Task]) -> None:
    labelled = parse_task(wanted.task, list(recipe.towers))
    if not labelled.given:
        raise ValueError(f"pseudo_labels.task {wanted.task!r} gives nothing; name what is known, such as speech->text")
    if labelled.repeats:
        raise ValueError(
            f"pseudo_labels.task cannot be {wanted.task!r}, which names a modality twice: one would be lost"
        )
    have = set(labelled.modalities)
    for template, task in tasks.items():
        if recipe.tasks[template] > 0 and (missing := sorted(set(task.modalities) - have)):
            raise ValueError(
                f"pseudo_labels: rows of {wanted.task!r} serve in all tasks, but have no {missing} for {template!r}"
            )


def stream_limits(model: Writer) -> list[tuple[list[str], int, str]]:
    """Of each decoder that has a limit: whose segments it reads, its positions, and what it is called."""
    decoders = model.backbones()
    found = []
    for name, backbone in decoders.items():
        if limit := position_limit(backbone) or getattr(backbone.config, "max_position_embeddings", None):
            alone = len(decoders) == 1
            found.append((model.names if alone else [name], limit, _called(name, alone)))
    return found


def _called(name: str, alone: bool) -> str:
    return "the single decoder" if alone else f"tower {name!r}"


def check_lengths(
    model: Writer, rows: Iterable[Mapping[str, tuple[int, int]]], tasks: Sequence[Task], together: int
) -> None:
    """That every stream fits its decoder: a tower reads its own segments, as often as a task names them, a single
    decoder all of them; and, where several rows come together in a document, the longest ones do.

    Args:
        model: that reads. rows: of each, by modality, how many tokens in how many segments. tasks: that are trained.
        together: how many rows come in one document at most.

    Raises:
        ValueError: for the first that does not.
    """
    # A row of one segment each comes as a task says; a whole document, which may have more, as it is.
    times = {name: max([1, *(task.modalities.count(name) for task in tasks)]) for name in model.names}
    decoders = model.backbones()
    longest = [[0] * together for _ in decoders]  # heaps of the longest streams of each
    for counts in rows:
        lengths = []
        for name in model.names:
            tokens, segments = counts.get(name, (0, 0))
            lengths.append((tokens + 2 * segments) * (times[name] if segments == 1 else 1))
        for heap, length in zip(longest, [sum(lengths)] if len(decoders) == 1 else lengths):
            heapq.heappushpop(heap, length)
    for (name, backbone), heap in zip(decoders.items(), longest):
        check_length(backbone, [sum(heap)], _called(name, len(decoders) == 1))
