"""What a pass over whole documents is scored by: next-token cross-entropy at the target tokens.

A loss is a sum over targets, divided by their number: the batch's own, which makes it a mean, or that of all batches
whose gradients are added before the optimizer steps. Then gradients are those of one large batch, however it is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from transformers.utils import ModelOutput

from zipper_lm.data.collation import IGNORED, TowerBatch


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


def loss_at(counts: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Summed next-token cross-entropy where it counts: elsewhere there is no gradient, nor a float32 copy of logits.

    Args:
        counts: bool ``[batch, time - 1]``. logits: ``[batch, time, vocab]``. labels: int64 ``[batch, time - 1]``, the
            next tokens.
    """
    return F.cross_entropy(logits[:, :-1][counts].float(), labels[counts], reduction="sum")


def targets(stream: TowerBatch, size: int) -> Tensor:
    """What each position shall say next, int64 ``[batch, time - 1]``. An id that the tower can read but not write, as
    ImageGPT's one special id is, is no target.

    Args:
        stream: the tower's side of the batch. size: number of ids that it can write.
    """
    labels = stream["labels"][:, 1:]
    return labels.masked_fill(labels >= size, IGNORED)
