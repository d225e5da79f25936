"""Pseudo-labels: rows of which one side is known get the other from a model, and the next model learns from both.

Where pairs are few and sound is plenty, a model that was fused on the pairs writes down what it hears in the rest. What
it writes has errors; what it heard is real, and that is what text->speech learns to write (back-translation, Sennrich
et al. 2016, arXiv 1511.06709; for recognisers: self-training, Kahn et al. 2020, arXiv 1909.09116).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from zipper_lm.codecs.codec import codec_hash
from zipper_lm.data.broken import Broken
from zipper_lm.data.collation import collate
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.encoding import Joined, encode_rows
from zipper_lm.data.prepared import TRAIN
from zipper_lm.data.sources.table import readable
from zipper_lm.data.tasks import Task, build_document, parse_task
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.recipes.schema import DataRecipe, FuseRecipe, PseudoLabelsRecipe
from zipper_lm.jobs.rows import DataSource, Opened
from zipper_lm.utils.files import as_json, new_file
from zipper_lm.utils.json_files import parse_json
from zipper_lm.utils.processes import from_main, main_console, shared
from zipper_lm.utils.progress import barred
from zipper_lm.utils.randomness import draws_of, new_seed, randomness_kept

BATCH = 32
LABELS_FILE = "pseudo_labels.jsonl"
"""In the working folder: a run that is resumed learns from the labels that it began with."""


def labeller_recipe(recipe: FuseRecipe) -> FuseRecipe:
    """The recipe of the model that writes the labels: the same without pseudo-labels, or with an earlier round's, for
    as many steps as they say.

    It has all of the recipe's tasks: what is learned for one keeps towers from forgetting for another. That by which it
    writes labels chooses its checkpoint: speaking may be at its best long before reading is.

    Raises:
        ValueError: if the recipe has no pseudo-labels.
    """
    wanted = recipe.pseudo_labels
    if wanted is None:
        raise ValueError("pseudo_labels: the recipe has none")
    before = None
    if wanted.rounds > 1:
        before = replace(wanted, rounds=wanted.rounds - 1, model=f"{Path(wanted.model)}-before")
    training = replace(recipe.training, steps=wanted.steps or recipe.training.steps)
    scored = [wanted.task] if recipe.tasks.get(wanted.task, 0.0) > 0.0 else recipe.scored
    return replace(recipe, scored=scored, pseudo_labels=before, training=training, output=wanted.model)


class Unlabelled(NamedTuple):
    """Rows that get labels: the task by which they do, the rows, open, and where they are from."""

    task: Task
    rows: Opened
    source: DataSource


def _data_of(recipe: FuseRecipe) -> DataRecipe:
    """Where the rows are that get labels: a data set of their own, or a split of the recipe's, as a whole."""
    wanted = recipe.pseudo_labels
    assert wanted is not None
    data = replace(recipe.data, fraction=1.0, limit=wanted.limit, clips=None, validation=None)
    if wanted.source is None:
        return replace(data, train=wanted.train or data.train)
    own = {"source": wanted.source, "revision": wanted.revision, "columns": wanted.columns, "exclude": {}}
    return replace(data, **own, train=wanted.train or TRAIN)  # type: ignore[arg-type]


def open_unlabelled(recipe: FuseRecipe) -> Unlabelled:
    """The rows that a recipe's labeller writes labels for. Of a source of their own only what the task gives has to be
    there.

    Raises:
        ValueError: if the data cannot be read, or its rows lack what the task gives.
    """
    wanted = recipe.pseudo_labels
    assert wanted is not None
    task, data = parse_task(wanted.task, list(recipe.towers)), _data_of(recipe)
    source = DataSource(data)
    rows = source.open(TRAIN, check=wanted.source is None)
    source.check_modalities(task.given)
    first: Any = next(readable(rows))
    if isinstance(first, Document):
        raise ValueError(f"pseudo_labels: {data.source} holds whole documents; rows of {list(task.given)} are needed")
    if missing := [name for name in task.given if first.get(name) is None]:
        raise ValueError(
            f"pseudo_labels: the rows of {data.source} have no {missing}, only {sorted(first)}; name the columns in "
            "pseudo_labels.columns"
        )
    return Unlabelled(task, rows, source)


def check_labeller(labeller: Writer, model: Writer, task: Task, source: DataSource) -> None:
    """That what the labeller reads and writes means the same to the model that learns from it.

    Args:
        labeller: writes. model: learns. task: by which rows get labels. source: where they are from.

    Raises:
        ValueError: if a codec is another one, of the labeller or of prepared rows, or missing.
    """
    assert model.processor is not None
    theirs = labeller.processor.codecs if labeller.processor is not None else {}
    for name in dict.fromkeys(task.modalities):
        if name not in theirs or codec_hash(theirs[name]) != codec_hash(model.processor.codecs[name]):
            raise ValueError(f"pseudo_labels.model has another codec of {name!r} than the model that learns from it")
    source.check_codecs(model.processor.codecs)


def label(
    labeller: Writer,
    model: Writer,
    task: Task,
    rows: Opened,
    wanted: PseudoLabelsRecipe,
    settings: Mapping[str, Any],
    broken: Broken,
) -> list[dict[str, Segment]]:
    """Rows with what is known, encoded, and what the labeller wrote. Several processes share the work.

    Args:
        labeller: writes. model: what will be trained; its codecs encode. task: what is given, what is written.
        rows: open; of each only what the task gives is read. wanted: the recipe's.
        settings: of generation, by modality. broken: takes what cannot be read.

    Returns:
        The rows for which something was written, the surest ones if not all are kept, in their order.

    Raises:
        ValueError: if nothing was written, or `broken` is full.
    """
    assert model.processor is not None
    known = encode_rows(model.processor, rows, list(task.given), broken)
    batches = [known[start : start + BATCH] for start in range(0, len(known), BATCH)]
    with randomness_kept():
        seed = from_main(new_seed())

    def write(number: int) -> list[tuple[dict[str, Segment], float]]:
        """The rows of a batch for which something was written, and how sure of it the labeller is."""
        given = [[replace(row[m]) for m in task.given] for row in batches[number]]
        documents = [Document(segments) for segments in given if all(s.ids for s in segments)]
        with draws_of(seed, number):
            written = labeller.generate(documents, list(task.targets), settings=settings, decode="text" in task.targets)
        rows = [{s.modality: s for s in document} for document in written if all(s.ids for s in document)]
        return [(row, _loss(labeller, build_document(task, row)) if wanted.keep < 1.0 else 0.0) for row in rows]

    done = shared(range(len(batches)), write)
    found = [each for part in barred(done, main_console(), "pseudo-labels", len(batches)) for each in part]
    labelled = [row for row, _ in found]
    if not labelled:
        raise ValueError(f"pseudo_labels: {wanted.model} wrote nothing for any of {len(known)} rows")
    if wanted.keep == 1.0:
        return labelled
    surest = np.argsort([loss for _, loss in found], kind="stable")[: max(1, round(wanted.keep * len(labelled)))]
    return [labelled[i] for i in sorted(surest.tolist())]


@torch.no_grad()
def _loss(model: Writer, document: Document) -> float:
    """Nats per token of what was written."""
    output = model(collate([document], model.specials))
    return float(np.mean([float(output.losses[s.modality]) for s in document if s.target]))


def mixed(aligned: Sequence[Any], labelled: Sequence[Any], share: float | None) -> Sequence[Any]:
    """Aligned and labelled rows as one training set.

    Args:
        aligned, labelled: encoded.
        share: of the labelled ones, as near as repeating either of them comes to it. `None`: each once.
    """
    if share is None:
        return Joined(aligned, labelled)
    per_pair = share / (1 - share) * len(aligned) / len(labelled)
    return Joined(*[aligned] * max(1, round(1 / per_pair)), *[labelled] * max(1, round(per_pair)))


def write_labels(folder: Path, rows: Sequence[Mapping[str, Segment]]) -> None:
    """Keep labelled rows in a run's working folder."""
    with new_file(folder / LABELS_FILE, overwrite=True) as new, new.open("w", encoding="utf-8") as file:
        for row in rows:
            plain = {
                m: {"ids": list(s.ids or []), "value": s.value if isinstance(s.value, str) else None}
                for m, s in row.items()
            }
            file.write(as_json(plain) + "\n")


def read_labels(folder: Path) -> list[dict[str, Segment]]:
    """What `write_labels` wrote.

    Raises:
        ValueError: if it is not there.
    """
    file = folder / LABELS_FILE
    if not file.is_file():
        raise ValueError(f"cannot resume: {file} is gone; start anew (--overwrite)")
    lines = file.read_text(encoding="utf-8").splitlines()
    return [{m: Segment(m, **fields) for m, fields in parse_json(line, str(file)).items()} for line in lines]
