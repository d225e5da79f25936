"""The cache of a captured step: what is kept of many rows, side by side, at fixed addresses.

What is unusual here: rows that began at different times share their *columns*. All of them write the next token into
the same column, as rows of one left-padded batch do; a newcomer's past is laid into the columns just before it. So
nothing but the ordinary mask of a left-padded batch is needed, distances in columns are distances in tokens (a sliding
window is right as it is), and a family's own forward does all of it. When the columns are full, everything moves left
by as many as nobody needs any more.

Keys and values of every token lie in columns. A recurrent state lies in none (`state_layer.py`).
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer, StaticLayer

from zipper_lm.generation.engine.reach import SPARE, Reach
from zipper_lm.generation.engine.state_layer import StateLayer


class NotInColumns(Exception):
    """What a family keeps of a token cannot be laid into columns."""


class ColumnLayer(StaticLayer):
    """Keys and values of one layer.

    Args:
        like_keys, like_values: ``[1, heads, any, width]``, whose heads, widths, dtype and device these have.
        rows: R. reach: how many columns there are, and are read; shared by all layers.
        column: int64 ``[1]``, shared by all layers: where the next token is written. It is not moved by `update`.

    Attributes:
        keys, values: ``[R, heads, C + SPARE, width]``.
    """

    is_sliding = False  # a window is a matter of the mask
    keys: Tensor
    values: Tensor

    def __init__(self, like_keys: Tensor, like_values: Tensor, rows: int, reach: Reach, column: Tensor) -> None:
        super().__init__(max_cache_len=reach.most)
        self.reach, self.column = reach, column
        self.keys, self.values = (
            torch.zeros(rows, like.shape[1], reach.most + SPARE, like.shape[-1], dtype=like.dtype, device=like.device)
            for like in (like_keys, like_values)
        )
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.batch_size, self.num_heads = rows, like_keys.shape[1]
        self.is_initialized = True
        for tensor in (self.keys, self.values):
            torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token of every row that is computed, ``[r, heads, 1, width]``; returns what is read of these."""
        rows, size = self.reach.rows, len(self.reach.columns)
        for own, new in ((self.keys, key_states), (self.values, value_states)):
            new = new.to(own.dtype)  # autocast may make one narrower than the other
            if rows is None:
                own.index_copy_(2, self.column, new)
            else:
                heads = torch.arange(new.shape[1], device=new.device)
                own.index_put_((rows[:, None], heads, self.column), new[:, :, 0])
        keys, values = self.reach.here(self.keys), self.reach.here(self.values)
        return keys[:, :, :size], values[:, :, :size]

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """How many columns are read, and from which one on."""
        return len(self.reach.columns), 0

    def get_seq_length(self, *_: Any) -> Any:
        """The column of the token that is being read, counted from 0."""
        return self.column[0]

    def join(self, row: int, layer: Any, column: int) -> None:
        """See `KeptLayer`. A past, ``[1, heads, time, width]``, lies in a row's columns before `column`."""
        for own, new in () if layer is None else ((self.keys, layer.keys), (self.values, layer.values)):
            own[row, :, column - new.shape[2] : column] = new[0]

    def rest(self, row: int) -> None:
        """See `KeptLayer`. Columns stay."""

    def take(self, row: int, begin: int, end: int) -> list[Tensor]:
        """See `KeptLayer`."""
        return [own[row : row + 1, :, begin:end].clone() for own in (self.keys, self.values)]

    def add(self, layer: Any, taken: list[Tensor]) -> None:
        """See `KeptLayer`."""
        layer.update(*taken)

    def move(self, by: int) -> None:
        """Move everything by so many columns, to the right where positive; what leaves is forgotten."""
        for own in (self.keys, self.values):
            own.copy_(own.roll(by, 2))

    def progress(self) -> list[Tensor]:
        """See `KeptLayer`. A column that is written again is the same."""
        return []


class StateAndColumnLayer(StateLayer, ColumnLayer):  # type: ignore[misc, override]
    """A layer that keeps both.

    Args:
        like, rows, reach, column: see `StateLayer` and `ColumnLayer`.
    """

    def __init__(self, like: Any, rows: int, reach: Reach, column: Tensor) -> None:
        ColumnLayer.__init__(self, like.keys, like.values, rows, reach, column)
        StateLayer.__init__(self, like, rows)

    def join(self, row: int, layer: Any, column: int) -> None:
        """See `KeptLayer`."""
        ColumnLayer.join(self, row, layer, column)
        StateLayer.join(self, row, layer, column)

    def take(self, row: int, begin: int, end: int) -> list[Tensor]:
        """See `KeptLayer`."""
        return [*ColumnLayer.take(self, row, begin, end), *StateLayer.take(self, row, begin, end)]

    def add(self, layer: Any, taken: list[Tensor]) -> None:
        """See `KeptLayer`."""
        ColumnLayer.add(self, layer, taken[:2])
        StateLayer.add(self, layer, taken[2:])

    def move(self, by: int) -> None:
        """See `KeptLayer`."""
        ColumnLayer.move(self, by)


class KeptLayer(Protocol):
    """What a step keeps of one layer for all of its rows."""

    def join(self, row: int, layer: Any, column: int) -> None:
        """Take the past of a row, which reads on at `column`, from a layer of its own; `None`: it has none."""

    def rest(self, row: int) -> None:
        """A row writes no more, and keeps what it has read."""

    def take(self, row: int, begin: int, end: int) -> list[Tensor]:
        """What a row has read in some columns: copies, which outlive the row."""

    def add(self, layer: Any, taken: list[Tensor]) -> None:
        """Add what was taken to a layer of one row."""

    def move(self, by: int) -> None:
        """Move everything by so many columns, to the right where positive; what leaves is forgotten."""

    def progress(self) -> list[Tensor]:
        """What a step that is done again would not find as it was."""


def kept_layers(cache: Cache) -> list[tuple[int, KeptLayer]]:
    """Of a `column_cache`, the layers that keep anything, with their numbers."""
    return [(n, layer) for n, layer in enumerate(cache.layers) if isinstance(layer, ColumnLayer | StateLayer)]


def column_cache(like: Cache, rows: int, reach: Reach, column: Tensor) -> Cache:
    """A cache of columns for rows of which `like`, of any number of tokens, is one.

    Raises:
        NotInColumns: if a layer keeps anything but keys and values of attention and recurrent states.
    """
    return Cache(layers=[_layer(layer, rows, reach, column) for layer in like.layers])


def _layer(like: Any, rows: int, reach: Reach, column: Tensor) -> Any:
    states, attends = isinstance(like, LinearAttentionLayer), isinstance(getattr(like, "keys", None), Tensor)
    known = {*(("keys", "values") if attends else ()), *(("conv_states", "recurrent_states") if states else ())}
    if more := sorted(name for name, value in vars(like).items() if name not in known and _keeps(value)):
        raise NotInColumns(f"its {type(like).__name__} keeps {', '.join(more)}")
    if attends and (like.keys.ndim != 4 or like.values.ndim != 4):
        raise NotInColumns(f"its {type(like).__name__} keeps keys and values of other axes")
    if states and attends:
        return StateAndColumnLayer(like, rows, reach, column)
    if attends:
        return ColumnLayer(like.keys, like.values, rows, reach, column)
    if states:
        return StateLayer(like, rows)
    if isinstance(like, DynamicLayer):  # it would grow
        raise NotInColumns(f"its {type(like).__name__} keeps nothing yet")
    return copy.copy(like)


def _keeps(value: Any) -> bool:
    """Whether there are numbers of several tokens or rows in an attribute."""
    if isinstance(value, dict | list | tuple):
        return any(map(_keeps, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor) and value.ndim > 0
