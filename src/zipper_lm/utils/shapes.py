"""Models without values: their tensors have shapes and dtypes, and take no memory.

A tensor on PyTorch's ``meta`` device is on no device where data could be, so whatever is made beside it has no values
either, masks and positions too, and a family that looks into them fails. A fake tensor says that it is on the CPU: what
is made of a batch stays real, and only what comes of weights is without values. So a model can be run on a real batch,
forward and backward, and what it does can be counted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

KEPT = 16
"""Tensors that a fake mode remembers."""


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values that can be looked at: not if it is on meta, or fake."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


class _ShortMemory(dict[Any, Any]):
    """What a fake mode remembers of its tensors, in place of weak references: `Module.to` cannot exchange a tensor that
    has one."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """The last few are kept: it asks for them again at once."""
        super().__setitem__(key, value)
        if len(self) > KEPT:
            del self[next(iter(self))]


@contextmanager
def without_values() -> Iterator[None]:
    """Modules that this thread makes in here have parameters and buffers without values, on the CPU by what they say;
    they stay so, and can be called later, outside."""
    mode, here, thread = FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), threading.get_ident()
    memory: Any = mode.fake_tensor_converter.meta_converter
    usual, memory.tensor_memo = memory.tensor_memo, _ShortMemory()

    def fake(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor.detach().to("meta"), here)

    def parameter(module: nn.Module, name: str, made: Any) -> Any:
        if made is None or isinstance(made, FakeTensor) or threading.get_ident() != thread:
            return None  # it is taken as it is
        return nn.Parameter(fake(made), requires_grad=made.requires_grad)

    def buffer(module: nn.Module, name: str, made: Any) -> Any:
        if made is None or isinstance(made, FakeTensor) or threading.get_ident() != thread:
            return None
        return fake(made)

    with ExitStack() as stack:
        for hook in (
            register_module_parameter_registration_hook(parameter),
            register_module_buffer_registration_hook(buffer),
        ):
            stack.callback(hook.remove)
        stack.enter_context(torch.device("meta"))
        stack.callback(setattr, memory, "tensor_memo", usual)
        yield
