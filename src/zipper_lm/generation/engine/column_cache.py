"""The cache of a captured step: keys and values of many rows, side by side, at fixed addresses.

What is unusual here: rows that began at different times share their *columns*. All of them write the next token into
the same column, as rows of one left-padded batch do; a newcomer's past is laid into the columns just before it. So
nothing but the ordinary mask of a left-padded batch is needed, distances in columns are distances in tokens (a sliding
window is right as it is), and a family's own forward does all of it. When the columns are full, everything moves left
by as many as nobody needs any more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer


class NotInColumns(Exception):
    """What a family keeps of a token cannot be laid into columns."""


class ColumnLayer(StaticLayer):
    """Keys and values of one layer.

    Args:
        like_keys, like_values: ``[1, heads, any, width]``, whose heads, widths, dtype and device these have.
        rows: R. columns: C.
        column: int64 ``[1]``, shared by all layers: where the next token is written. It is not moved by `update`.

    Attributes:
        keys, values: ``[R, heads, C, width]``.
    """

    is_sliding = False  # a window is a matter of the mask
    keys: Tensor
    values: Tensor

    def __init__(self, like_keys: Tensor, like_values: Tensor, rows: int, columns: int, column: Tensor) -> None:
        super().__init__(max_cache_len=columns)
        self.column = column
        self.keys, self.values = (
            torch.zeros(rows, like.shape[1], columns, like.shape[-1], dtype=like.dtype, device=like.device)
            for like in (like_keys, like_values)
        )
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.batch_size, self.num_heads = rows, like_keys.shape[1]
        self.is_initialized = True
        for tensor in (self.keys, self.values):
            torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of every row, ``[R, heads, 1, width]``; returns all columns."""
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> Any:
        """The column of the token that is being read, counted from 0."""
        return self.column[0]

    def join(self, row: int, keys: Tensor, values: Tensor, column: int) -> None:
        """Lay a past, ``[1, heads, time, width]``, into a row's columns before `column`."""
        for own, new in ((self.keys, keys), (self.values, values)):
            own[row, :, column - new.shape[2] : column] = new[0]

    def part(self, row: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Copies of some columns of a row, each ``[1, heads, end - begin, width]``."""
        return self.keys[row : row + 1, :, begin:end].clone(), self.values[row : row + 1, :, begin:end].clone()

    def move(self, by: int) -> None:
        """Move everything by so many columns, to the right where positive; what leaves is forgotten."""
        for own in (self.keys, self.values):
            own.copy_(own.roll(by, 2))


def column_cache(like: Cache, rows: int, columns: int, column: Tensor) -> Cache:
    """A cache of columns for rows of which `like`, of any number of tokens, is one.

    Raises:
        NotInColumns: if a layer keeps anything but keys and values of attention.
    """
    layers: list[Any] = []
    for layer in like.layers:
        keys, values = (getattr(layer, name, None) for name in ("keys", "values"))
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.ndim != 4 or values.ndim != 4:
            raise NotInColumns(f"its {type(layer).__name__} keeps no keys and values of every token")
        if hasattr(layer, "conv_states") or hasattr(layer, "indexer_keys"):
            raise NotInColumns(f"its {type(layer).__name__} keeps more than keys and values")
        layers.append(ColumnLayer(keys, values, rows, columns, column))
    return Cache(layers=layers)
