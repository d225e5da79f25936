"""How fast something computes and how much it holds: by its data sheet, or tried here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

HALF = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where a run is planned.

    Attributes:
        name: for people.
        peak: floating-point operations a second, by name of a dtype: of dense products of matrices.
        memory: bytes.
        utilisation: share of the peak that a step reaches. It is an assumption.
        launch: seconds that the host takes to tell it of an operation, which it computes behind that.
        origin: where the figures are from.
    """

    name: str
    peak: dict[str, float]
    memory: float
    utilisation: float
    launch: float = 0.0
    origin: str

    def seconds(self, flops: Mapping[str, float], calls: float) -> float:
        """For so many floating-point operations, by dtype, in so many calls: the longer of computing and of launching.
        What is in no dtype of the device counts as its slowest."""
        slowest = min(self.peak.values())
        computing = sum(n / (self.peak.get(dtype, slowest) * self.utilisation) for dtype, n in flops.items())
        return max(computing, calls * self.launch)


UTILISATION, OF_MEASURED = 0.3, 0.7
"""Assumed of a data sheet's peak, and of what a product of large matrices reached here."""

LAUNCH = 25e-6
"""Assumed: seconds that a host takes to tell a GPU of an operation, without torch.compile. On the host of an H200 they
were 23 to 32 (`benchmarks/plan.py`)."""

_PUBLISHED = "data sheet, dense, no sparsity"


def _published(name: str, half: float, tf32: float, gigabytes: float) -> Device:
    """float32 is by TF32, which training on such devices may be set to (training.arguments: {tf32: true})."""
    peak = {**dict.fromkeys(HALF, half * 1e12), "float32": tf32 * 1e12}
    how: dict[str, Any] = {"utilisation": UTILISATION, "launch": LAUNCH, "origin": _PUBLISHED}
    return Device(name=name, peak=peak, memory=gigabytes * 1e9, **how)


DEVICES = {
    "a100": _published("NVIDIA A100 80 GB", 312, 156, 80),
    "h100": _published("NVIDIA H100 SXM", 989, 494, 80),
    "h200": _published("NVIDIA H200", 989, 494, 141),
    "l4": _published("NVIDIA L4", 121, 60, 24),
    "l40s": _published("NVIDIA L40S", 362, 183, 48),
}
"""By the name that `--device` takes."""


def find_device(
    name: str | None = None,
    *,
    flops: float | None = None,
    memory: float | None = None,
    utilisation: float | None = None,
    dtypes: tuple[str, ...] = ("float32",),
) -> Device:
    """What a run is planned for.

    Args:
        name: of `DEVICES`; `None`: this machine, of which `dtypes` are tried.
        flops: a second, reached by a step, in place of peak and utilisation.
        memory: GB, in place of the device's. utilisation: of the peak, in (0, 1].

    Raises:
        ValueError: for an unknown name, or a number that cannot be.
    """
    for field, value in (("flops", flops), ("memory", memory), ("utilisation", utilisation)):
        if value is not None and not value > 0:
            raise ValueError(f"plan: --{field}={value}: must be above 0")
    if utilisation is not None and utilisation > 1:
        raise ValueError(f"plan: --utilisation={utilisation}: must be at most 1")
    if flops is not None and utilisation is not None:
        raise ValueError(f"plan: --utilisation={utilisation} has no effect with --flops, which is what a step reaches")
    if name is not None and name not in DEVICES:
        raise ValueError(f"plan: --device={name!r}: must be one of {sorted(DEVICES)}; or give --flops and --memory")
    device = DEVICES[name] if name is not None else _here(() if flops is not None else dtypes)
    if flops is not None:
        device = replace(
            device, peak=dict.fromkeys((*HALF, "float32"), flops), utilisation=1.0, launch=0.0, origin="--flops"
        )
    if utilisation is not None:
        device = replace(device, utilisation=utilisation)
    return device if memory is None else replace(device, memory=memory * 1e9)


def _here(dtypes: tuple[str, ...]) -> Device:
    if torch.cuda.is_available():
        where, name = torch.device("cuda"), torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(where).total_memory
    else:
        where, name = torch.device("cpu"), f"this CPU, {torch.get_num_threads()} threads"
        memory = psutil.virtual_memory().total
    peak = {dtype: measure(where, getattr(torch, dtype)) for dtype in dtypes} or {"float32": 1.0}
    launch = LAUNCH if where.type == "cuda" else 0.0
    how: dict[str, Any] = {"utilisation": OF_MEASURED, "launch": launch, "origin": "measured here"}
    return Device(name=name, peak=peak, memory=float(memory), **how)


def measure(where: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations a second of products of matrices, the best of several within so many seconds."""
    size = 4096 if where.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    _wait(where)
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        left @ right
        _wait(where)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize()
