"""Pseudo-labels: rows of which one side is known get the other from a model, and the next model learns from both.

Where pairs are few and sound is plenty, a model that was fused on the pairs writes down what it hears in the rest. What
it writes has errors; what it heard is real, and that is what text->speech learns to write (back-translation, Sennrich
et al. 2016, arXiv 1511.06709; for recognisers: self-training, Kahn et al. 2020, arXiv 1909.09116).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from zipper_lm.collation import collate
from zipper_lm.data.broken import Broken
from zipper_lm.data.prepared import TRAIN, codec_hash
from zipper_lm.data.tasks import Task, build_document, parse_task
from zipper_lm.document import Document
from zipper_lm.generation import Writer
from zipper_lm.training.data import Joined, encode_rows, open_split
from zipper_lm.training.recipes import DataRecipe, FuseRecipe, PseudoLabelsRecipe

BATCH = 32


def labeller_recipe(recipe: FuseRecipe) -> FuseRecipe:
    """The recipe of the model that writes the labels: the same without pseudo-labels, or with an earlier round's.

    It has all of the recipe's tasks: what is learned for one keeps towers from forgetting for another.

    Raises:
        ValueError: if the recipe has no pseudo-labels.
    """
    wanted = recipe.pseudo_labels
    if wanted is None:
        raise ValueError("pseudo_labels: the recipe has none")
    before = None
    if wanted.rounds > 1:
        before = replace(wanted, rounds=wanted.rounds - 1, model=f"{wanted.model}-before")
    return replace(recipe, pseudo_labels=before, output=wanted.model, overwrite=False)


def source_of(recipe: FuseRecipe) -> DataRecipe:
    """Where the rows are that get labels: a data set of their own, or all of the recipe's own training split."""
    wanted = recipe.pseudo_labels
    assert wanted is not None
    data = replace(recipe.data, fraction=1.0, limit=wanted.limit, clips=None, validation=None)
    if wanted.source is None:
        return data
    return replace(data, source=wanted.source, revision=wanted.revision, columns=wanted.columns, train=wanted.train)


def open_unlabelled(recipe: FuseRecipe) -> tuple[Task, Any]:
    """The task by which rows get labels, and the rows, open.

    Raises:
        ValueError: if the task is none, or the data cannot be read.
    """
    wanted = recipe.pseudo_labels
    assert wanted is not None
    task = parse_task(wanted.task, list(recipe.towers))
    if not task.given:
        raise ValueError(f"pseudo_labels.task {wanted.task!r} gives nothing; name what is known, such as speech->text")
    return task, open_split(source_of(recipe), TRAIN)


def label(
    labeller: Writer,
    model: Writer,
    task: Task,
    rows: Any,
    wanted: PseudoLabelsRecipe,
    settings: Any,
    broken: Broken,
) -> list[dict[str, Any]]:
    """Rows with what is known, encoded, and what the labeller wrote.

    Args:
        labeller: writes. model: what will be trained; its codecs encode. task: what is given, what is written.
        rows: open; of each only what the task gives is read. wanted: the recipe's.
        settings: of generation, by modality. broken: takes what cannot be read.

    Returns:
        The rows for which something was written, the surest ones if not all are kept, in their order.

    Raises:
        ValueError: if a codec of the labeller is another than the model's, or nothing was written.
    """
    assert labeller.processor is not None
    assert model.processor is not None
    for name in set(task.modalities):
        if codec_hash(labeller.processor.codecs[name]) != codec_hash(model.processor.codecs[name]):
            raise ValueError(f"pseudo_labels.model has another codec of {name!r} than the model that learns from it")
    known = encode_rows(model.processor, rows, list(task.given), broken)
    starts = range(0, len(known), BATCH)
    labelled: list[dict[str, Any]] = []
    losses: list[float] = []
    for start in track(starts, "pseudo-labels", transient=True, console=Console(stderr=True)):
        given = [row for row in known[start : start + BATCH] if all(row[m].ids for m in task.given)]
        documents = [Document([replace(row[m]) for m in task.given]) for row in given]
        written = labeller.generate(documents, list(task.targets), settings=settings, decode="text" in task.targets)
        for row, document in zip(given, written):
            new = document.segments[len(task.given) :]
            if all(segment.ids for segment in new):
                made = {**row, **{s.modality: s for s in new}}
                labelled.append(made)
                if wanted.keep < 1.0:
                    losses.append(_loss(labeller, build_document(task, made)))
    if not labelled:
        raise ValueError(f"pseudo_labels: {wanted.model} wrote nothing for any of {len(known)} rows")
    if wanted.keep == 1.0:
        return labelled
    surest = np.argsort(losses, kind="stable")[: max(1, round(wanted.keep * len(labelled)))]
    return [labelled[i] for i in sorted(surest.tolist())]


@torch.no_grad()
def _loss(model: Writer, document: Document) -> float:
    """Nats per token of what was written."""
    output = model(collate([document], model.specials))
    return float(np.mean([float(output.losses[s.modality]) for s in document if s.target]))


def mixed(aligned: Sequence[Any], labelled: Sequence[Any], share: float | None) -> Sequence[Any]:
    """Aligned and labelled rows as one training set.

    Args:
        aligned, labelled: encoded. share: of the labelled ones; the aligned ones are repeated to come to the rest.
            `None`: as many as there are.
    """
    times = 1 if share is None else max(1, round(len(labelled) * (1 - share) / share / len(aligned)))
    return Joined(*[aligned] * times, labelled)
