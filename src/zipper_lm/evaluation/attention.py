"""Where zips look, how flat their attention is, and how much they add."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zipper_lm.data.collation import Batch
from zipper_lm.fusion.reading import read
from zipper_lm.fusion.zips import View, ZipLayer

if TYPE_CHECKING:
    from zipper_lm.fusion.network import ZippedTowers


@dataclass(frozen=True)
class Glimpse:
    """What one zip layer did in one batch.

    Attributes:
        weights: attention probabilities ``[B, H, Q, M]``; zeros for a query that sees nothing.
        view: who could read what.
        effect: size of the update over size of the hidden state it is added to, mean over queries that see something.
    """

    weights: Tensor
    view: View
    effect: float

    @property
    def entropy(self) -> float | None:
        """Mean entropy of the attention as a share of the largest possible; `None` if no query sees two tokens."""
        choices = (self.view.allowed & self.view.seen[:, None]).sum(-1).expand(self.weights.shape[:3])
        entropy = -(self.weights * self.weights.clamp_min(1e-12).log()).sum(-1)
        counted = choices >= 2  # with one token there is nothing to choose
        return float((entropy[counted] / choices[counted].float().log()).mean()) if counted.any() else None


def attention_maps(model: ZippedTowers, batch: Batch) -> dict[str, Tensor]:
    """Attention probabilities of every zip layer that acts in a batch, by ``reader<-source.k``: ``[B, H, Q, M]``."""
    return {name: glimpse.weights for name, glimpse in observe(model, batch).items()}


@torch.no_grad()
def observe(model: ZippedTowers, batch: Batch) -> dict[str, Glimpse]:
    """Run a batch and look over the shoulder of every zip layer that acts, by ``reader<-source.k``."""
    seen: dict[str, Glimpse] = {}
    was_training = model.training
    model.eval()
    with ExitStack() as hooks:
        for (reader, source), pairs in model.layer_pairs.items():
            for k in range(len(pairs)):
                layer = model.zip_layer(reader, source, k)
                handle = layer.register_forward_hook(_recorder(seen, f"{reader}<-{source}.{k}"))
                hooks.callback(handle.remove)
        read(model, batch)
    model.train(was_training)
    return seen


def _recorder(seen: dict[str, Glimpse], name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def record(layer: nn.Module, args: tuple[Any, ...], update: Tensor) -> None:
        assert isinstance(layer, ZipLayer)
        if len(args) < 4:  # it remembers
            return
        hidden, view = args[0], args[3]
        reads = view.seen[..., 0].expand(hidden.shape[:2])
        ratio = update.float().norm(dim=-1) / hidden.float().norm(dim=-1).clamp_min(1e-9)
        effect = float(ratio[reads].mean()) if reads.any() else 0.0
        seen[name] = Glimpse(layer.attention_map(*args), view, effect)

    return record
