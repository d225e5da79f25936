"""What a pass over whole documents is scored by: next-token cross-entropy at the target tokens.

A loss is a sum over targets, divided by their number: the batch's own, which makes it a mean, or that of all batches
whose gradients are added before the optimizer steps. Then gradients are those of one large batch, however it is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from zipper_lm.data.collation import IGNORED, TowerBatch
from zipper_lm.utils.host import send


@dataclass
class ZipperOutput(ModelOutput):
    """What `ZipperModel.forward` returns.

    Attributes:
        loss: weighted sum of `losses`, or `None` if the batch has no targets.
        losses: next-token cross-entropy per modality, and ``"handover"``: the mean over the batch's targets, or the sum
            over the number of targets that the model was told.
        logits: per tower, ``[batch, time, vocab]``.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Targets:
    """The tokens of a stream that count, found on the host: a device need not be asked how many there are.

    Attributes:
        places: int64 ``[count]``, of the tokens that they come after, in all ``batch * time``.
        labels: int64 ``[count]``, what they are.
    """

    places: Tensor
    labels: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> Self:
        """From what each position shall say next, int64 ``[batch, time - 1]``."""
        rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
        return cls(rows * (labels.shape[1] + 1) + columns, labels[rows, columns])

    def __len__(self) -> int:
        return len(self.labels)

    def loss(self, logits: Tensor) -> Tensor:
        """Their summed cross-entropy: elsewhere there is no gradient, nor a float32 copy of logits.

        Args:
            logits: ``[batch, time, vocab]``.
        """
        places, labels = send((self.places, self.labels), logits.device)
        return F.cross_entropy(logits.flatten(0, 1).index_select(0, places).float(), labels, reduction="sum")

    def loss_by_parts(self, head: Callable[[Tensor], Tensor], states: Tensor, number: int) -> Tensor:
        """The same, of logits that are made of a few targets at a time, and made again for the backward pass.

        Args:
            head: makes logits ``[targets, vocab]`` of states ``[targets, hidden]``. states: ``[batch, time, hidden]``.
            number: of targets in each part.
        """
        places, labels = send((self.places, self.labels), states.device)
        chosen = states.flatten(0, 1).index_select(0, places)
        parts = [
            checkpoint(partial(_summed, head), *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(chosen.split(number), labels.split(number), strict=True)
        ]
        return torch.stack(parts).sum()


def _summed(head: Callable[[Tensor], Tensor], states: Tensor, labels: Tensor) -> Tensor:
    logits = head(states)
    return F.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")


def share(loss: Tensor, number: Tensor) -> Tensor:
    """A summed loss by the number of its targets, which may stay on the host."""
    return loss / (number if number.device.type == "cpu" else number.to(loss.device))


def targets(stream: TowerBatch, size: int) -> Tensor:
    """What each position shall say next, int64 ``[batch, time - 1]``. An id that the tower can read but not write, as
    ImageGPT's one special id is, is no target.

    Args:
        stream: the tower's side of the batch. size: number of ids that it can write.
    """
    labels = stream["labels"][:, 1:]
    return labels.masked_fill(labels >= size, IGNORED)
