"""Matrix products of a training step on a CPU, by the library that is the faster one there (`utils/products.py`).

Under that setting, the fused attention for CPUs multiplies piece by piece, five times as slowly: attention is made of
whole products then, whose scores take memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.utils.products import by_onednn, is_left_to_us, is_quicker

MOST_SCORES = 2**28
"""Scores of attention that a step may keep for its backward pass, 1 GiB of float32; more is the fused attention's."""


@contextmanager
def quick_products(scores: int) -> Iterator[None]:
    """Multiply float32 matrices on the CPU by oneDNN inside, where that is exact and quicker. It is a setting of the
    process.

    Args:
        scores: of attention that are computed inside at most, see `scores_of`; `MOST_SCORES` are too many.
    """
    if scores > MOST_SCORES or not is_left_to_us() or not is_quicker():
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), by_onednn():
        yield


def scores_of(model: nn.Module, streams: Mapping[str, Tensor]) -> int:
    """How many scores of attention a model keeps of a batch, at most.

    Args:
        model: towers with zips, or one backbone. streams: ids by tower, ``[batch, time]``; of one backbone, those that
            it reads one behind the other.
    """
    times = {name: stream.shape[1] for name, stream in streams.items()}
    rows = max((len(stream) for stream in streams.values()), default=0)
    if not isinstance(model, ZippedTowers):
        return rows * sum(times.values()) ** 2 * _maps_of(model)
    found = sum(time**2 * _maps_of(model.backbones()[name]) for name, time in times.items())
    for (reader, source), pairs in model.layer_pairs.items():
        heads = sum(model.zip_layer(reader, source, k).heads for k in range(len(pairs)))
        found += times.get(reader, 0) * times.get(source, 0) * heads
    return rows * found


def _maps_of(backbone: nn.Module) -> int:
    """Heads times layers."""
    inner = next((m for m in backbone.modules() if isinstance(m, PreTrainedModel)), None)
    config = None if inner is None else inner.config.get_text_config(decoder=True)
    layers, heads = (getattr(config, field, None) for field in ("num_hidden_layers", "num_attention_heads"))
    return layers * heads if isinstance(layers, int) and isinstance(heads, int) else 0
