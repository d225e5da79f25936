"""Recurrent states in a captured step: each row has its own, of one size, and the past of a stream is all in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer


class StateLayer(LinearAttentionLayer):
    """Recurrent states of one layer: all that a row has read, in a state of one size. The library's own layer computes
    and writes them. A row that rests is fed like others, so what it had is put aside.

    Args:
        like: a layer of one row that has read something. rows: R.

    Attributes:
        conv_states, recurrent_states: by number, ``[R, ...]`` or `None`.
    """

    def __init__(self, like: LinearAttentionLayer, rows: int) -> None:
        super().__init__(number_of_states=like.number_of_states)
        self.device, self.dtype = like.device, like.dtype
        self.aside: dict[int, list[Tensor]] = {}
        for own, given in zip(_stores(self), _stores(like)):
            for number, state in given.items():
                if state is not None:
                    own[number] = state.new_zeros(rows, *state.shape[1:])
                    torch._dynamo.mark_static_address(own[number])
        _take_flags(self, like)

    def join(self, row: int, layer: Any, column: int) -> None:
        """See `KeptLayer`. Who has read nothing has a state of zeros."""
        self.aside.pop(row, None)
        past = [None] * len(_states(self)) if layer is None else _states(layer)
        for own, new in zip(_states(self), past, strict=True):
            own[row] = 0 if new is None else new[0]

    def rest(self, row: int) -> None:
        """See `KeptLayer`."""
        self.aside[row] = [state[row : row + 1].clone() for state in _states(self)]

    def take(self, row: int, begin: int, end: int) -> list[Tensor]:
        """See `KeptLayer`."""
        if row not in self.aside:
            self.rest(row)
        return self.aside.pop(row)

    def add(self, layer: Any, taken: list[Tensor]) -> None:
        """See `KeptLayer`."""
        new = iter(taken)
        for own, store in zip(_stores(self), _stores(layer)):
            store.update({number: None if state is None else next(new) for number, state in own.items()})
        layer.device, layer.dtype = self.device, self.dtype
        _take_flags(layer, self)

    def move(self, by: int) -> None:
        """See `KeptLayer`. States lie in no columns."""

    def progress(self) -> list[Tensor]:
        """See `KeptLayer`."""
        return _states(self)


def _stores(layer: Any) -> list[dict[int, Tensor | None]]:
    return [layer.conv_states, layer.recurrent_states]


def _states(layer: Any) -> list[Tensor]:
    return [state for store in _stores(layer) for state in store.values() if state is not None]


def _take_flags(layer: Any, like: Any) -> None:
    """What a layer of the library knows of its states."""
    for name in ("is_conv_states_initialized", "is_recurrent_states_initialized"):
        setattr(layer, name, dict(getattr(like, name)))
    layer.has_previous_state, layer.conv_kernel_size = dict(like.has_previous_state), dict(like.conv_kernel_size)
