"""A backbone's matrices in fewer bytes: where a token costs what it takes to read the weights, it costs less.

Only a matrix that is multiplied is held narrowly. Embeddings, norms and what is computed stay as they are, and so does
the backbone that the copy was made of.

A few rows, in a compiled step on a CPU, are sums that the compiler makes one loop of: the matrix is read once, its
numbers are widened on the way, and what is read is used for every row. More rows are multiplied in bfloat16, summed in
float32. A matrix that stays as it is, in float32, is also laid out anew for oneDNN where that multiplies faster
(`utils/products.py`): a second copy of it.
"""

from __future__ import annotations

from collections.abc import Collection
from math import gcd
from typing import Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zipper_lm.generation.engine.once import once
from zipper_lm.utils.products import LEAST_MATRIX, is_large, is_left_to_us, is_quicker, packed, product

Form = Literal["bf16", "int8"]
Module = TypeVar("Module", bound=nn.Module)
FEW = 8
"""Rows up to which a loop over the matrix is faster than a matrix product (measured on one core) ..."""
FEWER = 2
"""... and than oneDNN's, each of which is an operation of its own."""

PLACES = 4
"""Rows of a matrix that such a loop reads at once (measured on one core), while it keeps no more than ..."""
SUMS = 8
"""... so many sums: a processor has 16 registers at least."""


class NarrowLinear(nn.Module):
    """A linear layer whose matrix is held in bfloat16, or in int8 with a scale for every row, or as it is.

    Args:
        matrix: ``[out, in]``, any float dtype. bias: ``[out]`` or `None`; shared, not copied. form: of the matrix;
            `None`: as it is, and shared. transposed: whether `weight` is ``[in, out]``, as in GPT-2's `Conv1D`.
            ordered: the matrix as oneDNN reads it (`packed`); what is multiplied, then.
    """

    narrow: Tensor
    scale: Tensor | None

    def __init__(
        self,
        matrix: Tensor,
        bias: Tensor | None,
        form: Form | None,
        transposed: bool = False,
        ordered: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.ordered = ordered
        self.dtype, self.transposed, self.form, scale = matrix.dtype, transposed, form, None
        matrix = matrix.detach()
        if form == "int8":
            largest = matrix.float().abs().amax(1, keepdim=True)
            scale = torch.where(largest > 0, largest, 127.0) / 127  # a row of zeros has any scale
            matrix = (matrix.float() / scale).round().to(torch.int8)
            scale = scale[:, 0]
        self.width = matrix.shape[1]
        if form == "int8":  # torch's kernel reads 16 columns at once, and past the end of a row that has fewer
            matrix = F.pad(matrix, (0, -self.width % 16))
        dtypes = {"bf16": torch.bfloat16, "int8": torch.int8, None: matrix.dtype}
        self.register_buffer(
            "narrow", matrix.to(dtypes[form]) if form is None else matrix.to(dtypes[form]).contiguous()
        )
        self.register_buffer("scale", scale)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The matrix as wide as it was, made anew each time: some families look at it beside calling the layer."""
        wide = self.narrow[:, : self.width]
        wide = (wide if self.scale is None else wide * self.scale[:, None]).to(self.dtype)
        return wide.T if self.transposed else wide

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the input's dtype."""
        count = x.numel() // self.width
        if self.ordered is not None:
            y = product(x.reshape(count, self.width), self.ordered).reshape(*x.shape[:-1], -1)
        elif count <= FEW and x.device.type == "cpu" and torch.compiler.is_compiling():
            y = _by_loop(x.reshape(count, self.width).float(), self.narrow[:, : self.width])
            y = y.reshape(*x.shape[:-1], -1)
        elif self.form is None:
            y = F.linear(x, self.narrow)
        elif self.scale is None:
            y = F.linear(x.to(torch.bfloat16), self.narrow).float()
        elif x.device.type == "cpu":
            rows = F.pad(x.reshape(-1, self.width), (0, -self.width % 16)).to(torch.bfloat16)
            y = _int8_rows(rows.contiguous(), self.narrow).float().reshape(*x.shape[:-1], len(self.narrow))
        else:
            y = F.linear(x.to(torch.bfloat16), self.narrow[:, : self.width].to(torch.bfloat16)).float()
        if self.scale is not None:
            y = y * self.scale
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


def _by_loop(x: Tensor, matrix: Tensor) -> Tensor:
    """float32 ``[rows, in]`` times ``[out, in]`` of any dtype: ``[rows, out]``, as sums that a compiler makes one loop
    of. In each turn of it several rows of a large matrix are read: from one place memory gives less at a time."""
    places = max(1, min(PLACES, SUMS // len(x))) if matrix.numel() >= LEAST_MATRIX else 1
    parts = [part.float() for part in matrix.unflatten(0, (gcd(places, len(matrix)), -1)).unbind()]
    return torch.stack([torch.cat([(row * part).sum(-1) for part in parts]) for row in once(x).unbind()])


@torch.library.custom_op("zipper_lm::int8_rows", mutates_args=())
def _int8_rows(x: Tensor, narrow: Tensor) -> Tensor:
    """bfloat16 ``[rows, in]`` times int8 ``[out, in]``, `in` a multiple of 16: torch's own, behind an operator that
    Inductor leaves alone. Its lowering of torch's fails where the input is computed in the same graph."""
    return torch._weight_int8pack_mm(x, narrow, torch.ones(len(narrow), dtype=x.dtype))


@_int8_rows.register_fake
def _(x: Tensor, narrow: Tensor) -> Tensor:
    return x.new_empty(len(x), len(narrow))


def _ordered(matrix: Tensor, rows: int, compiled: bool) -> Tensor | None:
    """A matrix as oneDNN reads it, where a step of so many rows is faster by it."""
    plain = matrix.dtype == torch.float32 and matrix.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    wanted = rows > (FEWER if compiled else 0) and is_large(rows, matrix.numel())
    return packed(matrix, rows) if plain and wanted and is_left_to_us() and is_quicker() else None


def weights_as(
    backbone: Module, form: Form | None, keep: Collection[str] = (), *, rows: int = 0, compiled: bool = False
) -> Module:
    """Hold the matrices of a backbone's linear layers in fewer bytes, or as a step multiplies them best.

    Args:
        backbone: changed in place: a structural copy, whose modules are its own and whose tensors may be another's.
            No tensor is written to. Its weights can be trained no more.
        form: ``"bf16"``, ``"int8"``, or `None` for as they are. A matrix of 16 bits stays as it is under ``"bf16"``.
        keep: names of parameters to leave alone, such as adapters. rows: how many a step multiplies; 0: any number, and
            a matrix that stays as it is is multiplied as it was. compiled: whether that step is.

    Returns:
        the backbone.

    Raises:
        ValueError: for another form, or a backbone without a linear layer (a mixture of experts may hold all its
            matrices in one tensor).
    """
    few = compiled and 0 < rows <= FEW
    if form is not None and form not in get_args(Form):
        raise ValueError(f"weights {form!r}: give one of {', '.join(get_args(Form))}, or none")
    layers = {
        name: module
        for name, module in backbone.named_modules(remove_duplicate=False)
        if type(module) in (nn.Linear, Conv1D) and f"{name}.weight" not in keep
    }
    if not layers and form is not None:
        raise ValueError(f"weights {form!r}: {type(backbone).__name__} has no linear layer to hold so")
    made: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        transposed = isinstance(layer, Conv1D)
        matrix = layer.weight.T if transposed else layer.weight
        as_it_is = form is None or (form == "bf16" and matrix.element_size() <= 2)
        if id(layer) not in made:
            ordered = _ordered(matrix, rows, compiled) if form is None else None
            if as_it_is and not few and ordered is None:
                continue
            made[id(layer)] = NarrowLinear(matrix, layer.bias, form, transposed, ordered).train(layer.training)
        parent, _, attribute = name.rpartition(".")
        setattr(backbone.get_submodule(parent), attribute, made[id(layer)])
    return backbone
