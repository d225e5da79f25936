"""The learning rate of the small networks that a codec has: up for a tenth of the steps, then down to nothing."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

_WARM = 0.1


def one_cycle(optimizer: Optimizer, rate: float, steps: int) -> OneCycleLR:
    """One cycle (Smith and Topin 2017, arXiv 1708.07120) of so many steps, at least 1, whose highest rate is `rate`."""
    total = steps + 1
    # A tenth of ten steps is a rise of no length, by which PyTorch's schedule divides.
    warm = _WARM if _WARM * total != 1 else 2 / total
    return OneCycleLR(optimizer, rate, total_steps=total, pct_start=warm)
