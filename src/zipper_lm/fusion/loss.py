"""What a pass over whole documents is scored by: next-token cross-entropy at the target tokens."""

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
        losses: mean next-token cross-entropy per modality, and ``"handover"``.
        logits: per tower, ``[batch, time, vocab]``.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: dict[str, Tensor] | None = None


def loss_at(counts: Tensor, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Next-token cross-entropy where it counts: elsewhere no float32 copy of the logits is made, and no gradient.

    Args:
        counts: bool ``[batch, time - 1]``. logits: ``[batch, time, vocab]``. labels: int64 ``[batch, time - 1]``, the
            next tokens. reduction: ``"mean"`` or ``"sum"``.
    """
    return F.cross_entropy(logits[:, :-1][counts].float(), labels[counts], reduction=reduction)


def targets(stream: TowerBatch, logits: Tensor) -> Tensor:
    """What each position shall say next, int64 ``[batch, time - 1]``. An id that the tower can read but not write, as
    ImageGPT's one special id is, is no target."""
    labels = stream["labels"][:, 1:].to(logits.device)
    return labels.masked_fill(labels >= logits.shape[-1], IGNORED)
