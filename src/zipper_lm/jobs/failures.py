"""What is looked at before and after a fusion's training: perplexities, and the signatures of failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zipper_lm.data.collation import Batch, collate
from zipper_lm.data.document import Document
from zipper_lm.data.tasks import build_document
from zipper_lm.evaluation.attention import observe
from zipper_lm.evaluation.preservation import perplexity
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs import signatures
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.models.zipper import ZipperModel

BATCHES = 8


def unimodal_perplexity(model: Writer, rows: Sequence[Any]) -> dict[str, float]:
    """Perplexity of all that is not frozen, on each modality alone."""
    plain = [r for r in rows if not isinstance(r, Document)]
    alone = {n: [r[n].ids or [] for r in plain if n in r] for n in model.trained_vocabularies()}
    return {n: perplexity(model, n, ids) for n, ids in alone.items() if ids}


def diagnose(
    recipe: FuseRecipe,
    model: Writer,
    rows: Sequence[Any],
    validation: Sequence[Any],
    before: Mapping[str, float],
) -> list[signatures.Signature]:
    """The signatures of failure that a trained model shows.

    Args:
        recipe: it was trained by. model: it. rows, validation: encoded. before: `unimodal_perplexity` then.
    """
    train, held_out = (some_batches(recipe, model, r) for r in (rows, validation))
    found = signatures.drift(before, unimodal_perplexity(model, validation))
    if isinstance(model, ZipperModel):
        found += signatures.not_started(*_activity(model, held_out))
    found += signatures.too_little_data(signatures.losses_on(model, train), signatures.losses_on(model, held_out))
    return found


def some_batches(recipe: FuseRecipe, model: Writer, rows: Sequence[Any]) -> list[Batch]:
    """A few batches of every task that has a weight, and of whole documents, uncorrupted."""
    size = recipe.training.batch_size
    few = rows[: BATCHES * size]
    plain = [r for r in few if not isinstance(r, Document)]
    documents = [r for r in few if isinstance(r, Document)]
    tasks = [template for template, weight in recipe.tasks.items() if weight > 0]
    documents += [build_document(task, row) for task in tasks for row in plain[:: len(tasks)]]
    return [collate(documents[i : i + size], model.specials) for i in range(0, len(documents), size)]


def _activity(model: ZipperModel, batches: Sequence[Batch]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean effect and mean attention entropy of every zip layer over batches."""
    effect: dict[str, list[float]] = {}
    entropy: dict[str, list[float]] = {}
    for batch in batches:
        for name, glimpse in observe(model, batch).items():
            effect.setdefault(name, []).append(glimpse.effect)
            if glimpse.entropy is not None:
                entropy.setdefault(name, []).append(glimpse.entropy)
    means = [{name: float(np.mean(values)) for name, values in seen.items()} for seen in (effect, entropy)]
    return means[0], means[1]
