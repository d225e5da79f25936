"""Where zips look: attention maps, and how flat they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zipper_lm.collation import Batch
from zipper_lm.reading import read
from zipper_lm.zips import View, ZipLayer

if TYPE_CHECKING:
    from zipper_lm.model import ZipperModel


@torch.no_grad()
def attention_maps(model: ZipperModel, batch: Batch) -> dict[str, Tensor]:
    """Attention probabilities of every zip layer that acts in a batch, by ``reader<-source.k``: ``[B, H, Q, M]``.

    A query that sees nothing has a row of zeros.
    """
    return {name: weights for name, (weights, _) in _observe(model, batch).items()}


def attention_entropy(model: ZipperModel, batch: Batch) -> dict[str, float]:
    """Mean entropy of every zip layer's attention as a share of the largest possible, by ``reader<-source.k``.

    Queries that see fewer than two tokens do not count: they have nothing to choose.
    """
    shares = {}
    for name, (weights, view) in _observe(model, batch).items():
        choices = (view.allowed & view.seen[:, None]).sum(-1).expand(weights.shape[:3])
        entropy = -(weights * weights.clamp_min(1e-12).log()).sum(-1)
        counted = choices >= 2
        if counted.any():
            shares[name] = float((entropy[counted] / choices[counted].float().log()).mean())
    return shares


@torch.no_grad()
def _observe(model: ZipperModel, batch: Batch) -> dict[str, tuple[Tensor, View]]:
    """Run a batch and look over the shoulder of every zip layer."""
    seen: dict[str, tuple[Tensor, View]] = {}
    was_training = model.training
    model.eval()
    with ExitStack() as hooks:
        for (reader, source), pairs in model.layer_pairs.items():
            for k in range(len(pairs)):
                layer = model.zip_layer(reader, source, k)
                handle = layer.register_forward_pre_hook(_recorder(seen, f"{reader}<-{source}.{k}"))
                hooks.callback(handle.remove)
        read(model, batch)
    model.train(was_training)
    return seen


def _recorder(seen: dict[str, tuple[Tensor, View]], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def record(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, ZipLayer)
        seen[name] = (layer.attention_map(*args), args[3])

    return record
