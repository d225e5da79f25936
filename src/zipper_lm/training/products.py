"""Matrix products of a training step on a CPU, by the library that is the faster one there.

PyTorch multiplies float32 by MKL, which gives processors of other makers than its own a slower path. oneDNN does not:
its products are as exact, and take half the time on AMD's with AVX-512 (`benchmarks/products.py`). PyTorch asks oneDNN
where it may multiply by bfloat16, which oneDNN does where a processor can (AMX); so this is tried first. Under that
setting, the fused attention for CPUs multiplies piece by piece, five times as slowly: attention is made of whole
products then, whose scores take memory.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from zipper_lm.fusion.network import ZippedTowers

MOST_SCORES = 2**28
"""Scores of attention that a step may keep for its backward pass, 1 GiB of float32; more is the fused attention's."""
_SETTING: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_EXACT = 1e-6  # of the norm: float32 rounds to 6e-8


@contextmanager
def quick_products(scores: int) -> Iterator[None]:
    """Multiply float32 matrices on the CPU by oneDNN inside, where that is exact and quicker. It is a setting of the
    process.

    Args:
        scores: of attention that are computed inside at most, see `scores_of`; `MOST_SCORES` are too many.
    """
    if scores > MOST_SCORES or _SETTING.fp32_precision not in ("none", "ieee") or not is_quicker():
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), _by_onednn():
        yield


@contextmanager
def _by_onednn() -> Iterator[None]:
    before, _SETTING.fp32_precision = _SETTING.fp32_precision, "bf16"
    try:
        yield
    finally:
        _SETTING.fp32_precision = before


@cache
def is_quicker() -> bool:
    """Whether MKL takes its slower path here, and oneDNN is exact. The same at every start: a run that goes on must
    round as the one before did."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    return torch.backends.mkl.is_available() and _vendor() == "AuthenticAMD" and _is_exact()


def _vendor() -> str:
    """Who made the processor; empty where the system does not say it in a file."""
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.is_file():
        return ""
    lines = (line.partition(":") for line in info.read_text(encoding="utf-8").splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "vendor_id"), "")


def _is_exact() -> bool:
    draws = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=draws) for _ in range(2))
    with _by_onednn():
        product = left @ right
    exact = left.double() @ right.double()
    return bool((product - exact).norm() <= _EXACT * exact.norm())


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
