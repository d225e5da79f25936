"""Losses beside the model's own, in training alone: on what zips look at, and on what they remember.

Each is for pairs of towers, which a recipe names by task: the reader is what the task writes, the source what it is
given. It is a sum over what it counts in an optimizer step, divided by their number in all its batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from zipper_lm.data.collation import IGNORED, Batch, TowerBatch, batch_on_host
from zipper_lm.data.tasks import Task
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.zips import ZipLayer
from zipper_lm.utils.letters import BLANK
from zipper_lm.utils.shapes import has_values

Pair = tuple[str, str]
"""Reader and source."""


class BesideLoss(Protocol):
    """One of them.

    Attributes:
        name: the recipe's field, and the part of the loss. weights: of pairs.
    """

    name: str
    weights: Mapping[Pair, float]

    def counts(self, batch: Batch) -> dict[Pair, Tensor]:
        """What costs in a batch are divided by, by pair: int64 scalars on the CPU."""

    def watch(
        self, model: ZippedTowers, batch: Batch, counts: Mapping[Pair, Tensor]
    ) -> AbstractContextManager[list[Tensor]]:
        """Where the model reads a batch inside, a list fills with the weighted costs, whose sum is the loss.

        Args:
            model: the model. batch: what it reads. counts: of the step that the batch is part of.
        """


def task_pairs(field: str, weights: Mapping[str, float], tasks: Mapping[str, Task]) -> dict[Pair, float]:
    """Which pairs of towers the tasks' weights are for.

    Args:
        field: of the training recipe. weights: by template. tasks: the recipe's, by template.

    Raises:
        ValueError: for a template that is no task of the recipe, or does not go from one modality to another.
    """
    pairs = {}
    for template, weight in weights.items():
        if template not in tasks:
            raise ValueError(f"training.{field} names {template!r}, but the tasks are {list(tasks)}")
        if len(set(tasks[template].modalities)) != 2 or len(tasks[template].modalities) != 2:
            raise ValueError(f"training.{field}: {template!r} does not go from one modality to one other")
        source, reader = tasks[template].modalities
        pairs[reader, source] = weight
    return pairs


def check_pairs(field: str, model: Any, pairs: Collection[Pair]) -> None:
    """Raise `ValueError` for pairs of which a model's zips cannot be held to anything, naming the recipe's field."""
    if pairs and getattr(model.config, "groups", None):
        raise ValueError(f"training.{field} is for zips that are trained together; these were combined")
    for reader, source in pairs:
        if (reader, source) not in getattr(model, "layer_pairs", {}):
            raise ValueError(f"training.{field} names '{source}->{reader}', but no zip lets {reader} read {source}")


@dataclass(frozen=True)
class SegmentPair:
    """A segment that is written, and the one it is written from: the source's last before it in its document.

    Attributes:
        row: of the batch. writes: int64 ``[time]``, where in the row the reader's tokens stand that tell the next one:
            BOS to the last, without EOS. read: int64 ``[time]``, where the source's stand, BOS and EOS among them.
        labels: int64 ``[time]``, what the reader shall write, without EOS.
    """

    row: int
    writes: Tensor
    read: Tensor
    labels: Tensor


def segment_pairs(batch: Batch, pair: Pair) -> list[SegmentPair]:
    """Those of a batch, on the CPU, in the order of its rows."""
    if not all(name in batch for name in pair):
        return []
    known = batch_on_host(batch)
    (reader, documents), (source, others) = ((known[name], _documents(known[name])) for name in pair)
    found = []
    targets = reader["labels"] != IGNORED
    for row in targets.any(1).nonzero()[:, 0].tolist():
        here = targets[row]
        segments = torch.stack([documents[row][here], reader["segments"][row][here]], 1).unique(dim=0)
        for document, number in segments.tolist():
            earlier = (others[row] == document) & (source["segments"][row] < number)
            if not earlier.any():
                continue
            last = source["segments"][row][earlier].max()
            own = ((documents[row] == document) & (reader["segments"][row] == number)).nonzero()[:, 0]
            read = (earlier & (source["segments"][row] == last)).nonzero()[:, 0]
            labels = reader["labels"][row][own][1:-1]
            found.append(SegmentPair(row, own[:-1], read, labels[labels != IGNORED]))
    return found


def _documents(side: TowerBatch) -> Tensor:
    """The number of each token's document, `ABSENT` for padding."""
    if "documents" in side:
        return side["documents"]
    return torch.where(side["segments"] >= 0, torch.arange(len(side["segments"]))[:, None], side["segments"])


def padded(places: list[Tensor]) -> Tensor:
    """Int64 tensors of one dimension as rows of one tensor, with zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(places, batch_first=True)


def summed_ctc(log_probs: Tensor, labels: Tensor, times: Tensor, lengths: Tensor) -> Tensor:
    """CTC's cost of some sequences together, in nats; a scalar.

    Args:
        log_probs: ``[time, sequences, classes]``. labels: int64 ``[sequences, length]``. times, lengths: int64
            ``[sequences]``, how many count.
    """
    if not has_values(log_probs):  # torch knows no shape of what this keeps; a plan counts products, and here are none
        return log_probs.sum()
    return F.ctc_loss(log_probs, labels, times, lengths, BLANK, "sum")


def watched_layer(layer: ZipLayer, watch: Callable[..., None]) -> RemovableHandle:
    """Let a zip layer tell of its calls: ``watch(layer, args)``, and the output, if it is told after the call.

    One that is spread over processes tells before it: what is then computed of its parameters finds them gathered in
    the backward pass, which goes the other way.
    """
    before = isinstance(layer, FSDPModule)
    return layer.register_forward_pre_hook(watch) if before else layer.register_forward_hook(watch)


def faded(step: int, steps: int, fade_out: float | None) -> float:
    """What these losses' weights are multiplied by in a step: 1 at the first, 0 from a share `fade_out` of all on."""
    return 1.0 if fade_out is None else max(0.0, 1.0 - step / max(1.0, fade_out * steps))
