"""The ways in which training a zipped model is known to fail, said in plain words, with what to do.

Losses, perplexities and what zips do are looked at before and after training; each way to fail is one function of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zipper_lm.codecs.codec import Codec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.collation import Batch, collate
from zipper_lm.data.document import Document
from zipper_lm.data.tasks import build_document, parse_task
from zipper_lm.evaluation.attention import observe
from zipper_lm.evaluation.preservation import perplexity
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.generation.writer import Writer
from zipper_lm.utils.processes import shared

BATCHES = 8
"""Batches that are looked at, of each split."""
DRIFT = 1.10
"""A trained tower's unimodal perplexity may rise by this factor before it is called drift."""
EFFECT = 0.02
"""A zip whose updates are smaller than this share of the hidden state they are added to does nothing yet."""
FLAT = 0.98
"""Attention entropy, as a share of the largest possible, above which attention looks at everything alike."""
SELDOM = 10
"""A token that stands fewer times than this in the training rows is hardly learned."""
RARE = 0.15
"""Share of held-out tokens that may be such ones, of a large vocabulary."""
LARGE = 5000
"""Ids of a vocabulary that is large for few pairs."""
GAP = 1.0
"""Held-out loss may exceed training loss by this many nats per token before data is called too little."""


@dataclass(frozen=True)
class Failure:
    """One failure that was seen: its name, and a sentence for the user."""

    name: str
    message: str


def drift(before: Mapping[str, float], after: Mapping[str, float]) -> list[Failure]:
    """Trained towers that lost part of what they knew: perplexity on unimodal data before and after, by tower."""
    return [
        Failure(
            "unimodal drift",
            f"tower {name!r} forgets: perplexity on its own modality rose from {before[name]:.2f} to "
            f"{after[name]:.2f}. Freeze it (towers.{name}.train=frozen), lower training.tower_learning_rate, or use "
            "lora.",
        )
        for name in after
        if after[name] > DRIFT * before[name]
    ]


def not_started(effect: Mapping[str, float], entropy: Mapping[str, float]) -> list[Failure]:
    """Directed zips that do nothing: they add next to nothing in every layer, or look at everything alike.

    Args:
        effect: mean size of the updates as a share of the hidden state, by ``reader<-source.k``.
        entropy: mean attention entropy as a share of the largest possible, by ``reader<-source.k``.
    """
    found = []
    for pair in dict.fromkeys(key.split(".")[0] for key in effect):
        keys = [k for k in effect if k.split(".")[0] == pair]
        largest = max(effect[k] for k in keys)
        flat = [entropy[k] for k in keys if k in entropy]
        if largest < EFFECT:
            reason = f"it adds at most {100 * largest:.1f} % to the reader's hidden state (gates or outputs near zero)"
        elif flat and min(flat) > FLAT:
            reason = f"its attention is flat (entropy {min(flat):.2f} of the largest possible in every layer)"
        else:
            continue
        found.append(
            Failure(
                "fusion not started",
                f"zip {pair} does little: {reason}. Raise training.learning_rate or training.steps, and keep the "
                "defaults gate_start: 1.0 and positions: sinusoid.",
            )
        )
    return found


def too_little_data(train: Mapping[str, float], held_out: Mapping[str, float]) -> list[Failure]:
    """Modalities whose held-out loss (nats per token) lies far above the training loss."""
    return [
        Failure(
            "too little aligned data",
            f"{name}: loss {held_out[name]:.2f} on held-out documents against {train[name]:.2f} in training. Add "
            "aligned pairs, raise training.corrupt (0.2), or train fewer steps (training.patience).",
        )
        for name in held_out
        if name in train and held_out[name] - train[name] > GAP
    ]


def rare_tokens(
    name: str, codec: Codec, train: Iterable[Sequence[int]], held_out: Iterable[Sequence[int]]
) -> list[Failure]:
    """A modality to be written whose held-out rows have many tokens that the training rows hardly have, in a vocabulary
    made for far more text. It is known before training.

    Args:
        name: of the modality. codec: its codec. train, held_out: ids of its rows.
    """
    if codec.vocab_size < LARGE:
        return []
    seldom, never = shares_seen_seldom(codec.vocab_size, train, held_out)
    if seldom <= RARE:
        return []
    return [
        Failure(
            "rare tokens",
            f"{name}: {100 * seldom:.0f} % of the tokens of held-out rows stand fewer than {SELDOM} times in the "
            f"training rows, {100 * never:.0f} % never. Let the codec spell in smaller pieces "
            f"(towers.{name}.codec.options.merges=1000, with its source), or add pairs.",
        )
    ]


def shares_seen_seldom(
    size: int, train: Iterable[Sequence[int]], held_out: Iterable[Sequence[int]]
) -> tuple[float, float]:
    """Of held-out tokens the share that stands fewer than `SELDOM` times in the training rows, and the share that never
    does.

    Args:
        size: of the vocabulary. train, held_out: ids of rows.
    """
    seen, wanted = (_token_counts(rows, size) for rows in (train, held_out))
    seldom, never = (float(wanted[seen < least].sum() / max(1, wanted.sum())) for least in (SELDOM, 1))
    return seldom, never


def _token_counts(rows: Iterable[Sequence[int]], size: int) -> np.ndarray:
    counts = np.zeros(size, dtype=np.int64)
    for ids in rows:
        np.add.at(counts, np.asarray(ids, dtype=np.int64), 1)
    return counts


def overfitted(name: str, train: float, held_out: float) -> list[Failure]:
    """A tower that was pre-trained until it knew its rows by heart: losses in nats per token, at the step it is of."""
    if held_out - train <= GAP:
        return []
    return [
        Failure(
            "overfitted tower",
            f"{name}: loss {held_out:.2f} on held-out rows against {train:.2f} in training. Set "
            "training.evaluate_every, so that the best checkpoint is kept; take fewer training.steps, a smaller "
            "backbone, or more unaligned data.",
        )
    ]


@torch.no_grad()
def losses_on(model: Writer, batches: Sequence[Batch]) -> dict[str, float]:
    """Mean loss per modality over batches, without training. Several processes share them."""
    was_training = model.training
    model.eval()
    sums: dict[str, list[float]] = {}
    for losses in shared(batches, lambda batch: _losses_of(model, batch)):
        for name, loss in losses.items():
            sums.setdefault(name, []).append(loss)
    model.train(was_training)
    return {name: math.fsum(values) / len(values) for name, values in sums.items()}


def _losses_of(model: Writer, batch: Batch) -> dict[str, float]:
    return {name: float(loss) for name, loss in (model(batch).losses or {}).items() if name in model.names}


def before_training(
    model: Writer, tasks: Sequence[str], rows: Sequence[Any], validation: Sequence[Any]
) -> list[Failure]:
    """The failures that can be foreseen.

    Args:
        model: with its codecs. tasks: that it is to be trained on. rows, validation: encoded; all of them.
    """
    written = {modality for task in tasks for modality in parse_task(task).targets}
    codecs = model.processor.codecs if model.processor is not None else {}
    found = []
    for name in sorted(written):
        if isinstance(codec := codecs.get(name), TextCodec):
            found += rare_tokens(name, codec, _ids_of(name, rows), _ids_of(name, validation))
    return found


def _ids_of(name: str, rows: Sequence[Any]) -> Iterator[Sequence[int]]:
    """A modality's, of rows that have it; whole documents are left out."""
    return (row[name].ids or [] for row in rows if not isinstance(row, Document) and name in row)


def unimodal_perplexity(model: Writer, rows: Sequence[Any]) -> dict[str, float]:
    """Perplexity of all that is not frozen, on each modality alone."""
    alone = {n: list(_ids_of(n, rows)) for n in model.trained_vocabularies()}
    return {n: perplexity(model, n, ids) for n, ids in alone.items() if ids}


def diagnose(
    model: Writer,
    tasks: Sequence[str],
    batch_size: int,
    rows: Sequence[Any],
    validation: Sequence[Any],
    before: Mapping[str, float],
) -> list[Failure]:
    """The failures that a trained model shows.

    Args:
        model: that was trained. tasks: what on. batch_size: documents that are read together.
        rows, validation: encoded. before: `unimodal_perplexity` before training.
    """
    train, held_out = (some_batches(model, tasks, batch_size, r) for r in (rows, validation))
    found = drift(before, unimodal_perplexity(model, validation))
    if isinstance(model, ZippedTowers):
        # Of a zip whose reader no task lets write, nothing was learned, and nothing is wrong.
        writes = {modality for task in tasks for modality in parse_task(task).targets}
        seen = ({k: v for k, v in each.items() if k.split("<-")[0] in writes} for each in _activity(model, held_out))
        found += not_started(*seen)
    found += too_little_data(losses_on(model, train), losses_on(model, held_out))
    return found


def some_batches(model: Writer, tasks: Sequence[str], size: int, rows: Sequence[Any]) -> list[Batch]:
    """A few batches of every task, and of whole documents, uncorrupted.

    Args:
        model: they are for. tasks: templates. size: documents in a batch. rows: encoded.
    """
    few = rows[: BATCHES * size]
    plain = [r for r in few if not isinstance(r, Document)]
    documents = [r for r in few if isinstance(r, Document)]
    documents += [build_document(task, row) for task in tasks for row in plain[:: len(tasks)]]
    return [collate(documents[i : i + size], model.specials) for i in range(0, len(documents), size)]


def _activity(model: ZippedTowers, batches: Sequence[Batch]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean effect and mean attention entropy of every zip layer over batches."""
    effect: dict[str, list[float]] = {}
    entropy: dict[str, list[float]] = {}
    for zips in shared(batches, lambda batch: _seen(model, batch)):
        for name, (added, spread) in zips.items():
            effect.setdefault(name, []).append(added)
            if spread is not None:
                entropy.setdefault(name, []).append(spread)
    means = [{name: float(np.mean(values)) for name, values in seen.items()} for seen in (effect, entropy)]
    return means[0], means[1]


def _seen(model: ZippedTowers, batch: Batch) -> dict[str, tuple[float, float | None]]:
    """Effect and attention entropy of every zip layer in a batch."""
    return {name: (glimpse.effect, glimpse.entropy) for name, glimpse in observe(model, batch).items()}
