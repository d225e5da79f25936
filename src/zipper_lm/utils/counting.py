"""What a piece of work computes and holds, counted while it runs, with values or without (`shapes.py`)."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_ATEN = torch.ops.aten


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return 2 * sdpa_flop_count(query.shape, key.shape, value.shape)


FORMULAS: dict[Any, Any] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Those of torch, and of the fused attention of CPUs, which it lacks: as if it were plain products of matrices."""


class Counting(TorchDispatchMode):
    """Counts within its span.

    Args:
        known: tensors that were there before: they, and views of them, are not counted as memory.

    Attributes:
        flops: by the dtype that is computed in, as `torch.utils.flop_counter` counts them, with its formulas: products
            of matrices, convolutions and attention.
        calls: operations that wrote something, however large: a GPU is told of each.
        held: bytes of what was made within and is still there. peak: the most that these were.
        aside: bytes of what is held that was set aside. peak_beside: the most that was held beside it.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()
        self.held = self.peak = self.aside = self.peak_beside = self.calls = 0
        self._apart: set[int] = set()
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that no other takes their place
        self._seen: dict[int, Any] = {storage._cdata: None for storage in self._known}

    @property
    def total_flops(self) -> int:
        """Of all dtypes."""
        return sum(self.flops.values())

    def set_aside(self, tensor: Tensor) -> None:
        """Count a tensor that was made within apart from the others from now on, such as a gradient that stays."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen and storage._cdata not in self._apart:
            self._apart.add(storage._cdata)
            self.aside += storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        outputs = [value for value in tree_iter(made) if isinstance(value, Tensor)]
        if (formula := FORMULAS.get(func._overloadpacket)) is not None and outputs:
            self.flops[outputs[0].dtype] += formula(*args, **kwargs, out_val=made)
        fresh = [self._hold(each) for each in outputs]
        self.calls += any(fresh) or func._schema.is_mutable
        return made

    def _hold(self, tensor: Tensor) -> bool:
        """Count a tensor's memory; whether it is new."""
        if tensor.is_sparse:
            return True
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return False
        self.held += size
        self.peak, self.peak_beside = max(self.peak, self.held), max(self.peak_beside, self.held - self.aside)

        def forget(_: Any) -> None:
            del self._seen[key]
            self.held -= size
            if key in self._apart:
                self._apart.discard(key)
                self.aside -= size

        self._seen[key] = weakref.ref(storage, forget)
        return True
