"""Matrix products of float32 on a CPU, by the library that is the faster one there.

PyTorch multiplies float32 by MKL, which gives processors of other makers than its own a slower path. oneDNN does not:
its products are as exact, and take half the time on AMD's with AVX-512 (`benchmarks/products.py`). There are two ways
to it. PyTorch asks oneDNN for every product where it may multiply by bfloat16 (`by_onednn`), which oneDNN does where a
processor can (AMX); so this is tried first. That is a setting of the process. Without gradients, operators can be
called that change nothing for other threads (`quick_layers`, `product`).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LEAST = 2**20
"""Multiplications from which oneDNN's product is the faster one: calling it takes longer (measured on one core)."""
LEAST_MATRIX = 2**18
"""Numbers of a matrix that is read from memory, rather than from a core's cache: then for fewer rows, too."""
LEAST_ROWS = 16
"""Rows from which layers are sent to oneDNN. Fewer wait for the matrix, by whichever library, and each function of a
step is called through Python: with one row of a tower of 135M a token took a tenth longer so (docs/cost.md)."""
_SETTING: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_EXACT = 1e-6  # of the norm: float32 rounds to 6e-8
SLOW = "which this processor multiplies many times as slowly as float32"
"""What people are told of `slow_matrices`."""
_HALF = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""Whether oneDNN takes a dtype here is known to PyTorch's operator of this name."""


@contextmanager
def by_onednn() -> Iterator[None]:
    """Every product of float32 is oneDNN's inside, in all threads; where a processor can, it is of bfloat16."""
    before, _SETTING.fp32_precision = _SETTING.fp32_precision, "bf16"
    try:
        yield
    finally:
        _SETTING.fp32_precision = before


def is_left_to_us() -> bool:
    """Whether nobody has set how PyTorch is to multiply."""
    return _SETTING.fp32_precision in ("none", "ieee")


@cache
def is_quicker() -> bool:
    """Whether MKL takes its slower path here, and oneDNN is exact. The same at every start: a run that goes on must
    round as the one before did."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    return torch.backends.mkl.is_available() and _vendor() == "AuthenticAMD" and _is_exact()


def is_multiplied_here(dtype: torch.dtype) -> bool:
    """Whether a library multiplies matrices of a dtype on this processor.

    Where oneDNN does not take bfloat16 or float16, as on processors with AVX2 alone, PyTorch multiplies them by plain
    loops, which take many times as long as products of float32, the longest where a matrix is transposed, as in a
    backward pass.
    """
    ask = getattr(torch.ops.mkldnn, _HALF.get(dtype, ""), None)
    return ask is None or bool(ask())


def slow_matrices(model: nn.Module, device: torch.device) -> dict[torch.dtype, str]:
    """By dtype that a device multiplies slowly (see `is_multiplied_here`), the first matrix of a model that has it.

    Args:
        model: whose parameters are looked at. device: where they will be.
    """
    found: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters() if device.type == "cpu" else ():
        if parameter.ndim > 1 and not is_multiplied_here(parameter.dtype):
            found.setdefault(parameter.dtype, name)
    return found


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
    with by_onednn():
        product = left @ right
    exact = left.double() @ right.double()
    return bool((product - exact).norm() <= _EXACT * exact.norm())


# --- without gradients -----------------------------------------------------------------------------------------------


def is_large(rows: int, numbers: int) -> bool:
    """Whether so many rows times a matrix of so many numbers are worth oneDNN's longer call."""
    return rows * numbers >= LEAST or numbers >= LEAST_MATRIX


def quick_layers(rows: int, width: int) -> AbstractContextManager[Any]:
    """Linear layers of float32 multiply by oneDNN inside, in this thread and without gradients, where that is quicker.

    What a setting of PyTorch's, or autocast, says of products holds. Each of PyTorch's functions takes microseconds
    longer inside, which small layers and few rows do not make up for.

    Args:
        rows: that are multiplied at once. width: of the states that layers pass on.
    """
    wanted = (
        rows >= LEAST_ROWS and is_large(rows, width**2) and is_left_to_us() and not torch.is_autocast_enabled("cpu")
    )
    return QuickLayers() if wanted and is_quicker() else nullcontext()


class QuickLayers(TorchFunctionMode):
    """See `quick_layers`; wherever one is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`F.linear` of plain float32 on the CPU is oneDNN's; everything else is itself."""
        if func is F.linear and not kwargs and _is_plain(*args) and not torch.is_grad_enabled():
            x, matrix, *bias = args
            if is_large(x.numel() // max(x.shape[-1], 1), matrix.numel()):
                return _linear(x, matrix, *bias)
        return func(*args, **kwargs) if kwargs else func(*args)


def _is_plain(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> bool:
    """Whether all are dense float32 on the CPU, and no subclass that knows better."""
    given = (x, matrix) if bias is None else (x, matrix, bias)
    kinds = {type(tensor) for tensor in given} <= {Tensor, nn.Parameter}
    return kinds and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in given) and matrix.ndim == 2


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")


def packed(matrix: Tensor, rows: int) -> Tensor:
    """A copy of a matrix, float32 ``[out, in]``, in the order in which oneDNN reads it; for `product` alone.

    Args:
        rows: about how many are multiplied at once.
    """
    return torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), rows)


# An operator without gradients that compilers leave alone: `torch.library.custom_op` takes twice as long to call.
torch.library.define("zipper_lm::product", "(Tensor x, Tensor matrix) -> Tensor")
torch.library.impl("zipper_lm::product", "default", _linear)


@torch.library.register_fake("zipper_lm::product")
def _(x: Tensor, matrix: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], matrix.shape[0])


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """float32 ``[..., in]`` times a `packed` ``[out, in]``: ``[..., out]``."""
    return torch.ops.zipper_lm.product(x, matrix)
