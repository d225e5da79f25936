"""A module whose parameters are spread over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`): how it is seen
whole, by what reads weights, writes tokens or compares tensors.

All here that gathers is done by all processes together; one that does not take part leaves the others waiting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


def is_sharded(module: nn.Module) -> bool:
    """Whether any part of a module is spread over processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return any(isinstance(part, FSDPModule) for part in module.modules())


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; one that has none is itself. All processes ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Tensors with all their shards, one after the other, those that had shards on the CPU.

    Args:
        tensors: by name, the same in all processes. keep: false: help to gather, and keep nothing.
    """
    found = {}
    for name, tensor in tensors.items():
        complete = whole(tensor)
        if keep:
            found[name] = complete.cpu() if isinstance(tensor, DTensor) else tensor
    return found


def fill(tensor: Tensor, value: Tensor) -> None:
    """Write a whole value into a tensor, or into its shard that is here; nothing is sent."""
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        value = value.to(tensor.device)
        value = distribute_tensor(value, mesh, tensor.placements, src_data_rank=None).to_local()
        tensor = tensor.to_local()
    tensor.copy_(value)


def reshard(module: nn.Module) -> None:
    """Let go of what was gathered and is still held, as a root's parameters are after a forward."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, a module is a plain one in every process, with whole parameters, and nothing waits for other processes.
    It is there to be read: what is written into parameters is lost. It takes the memory of the whole module.

    All processes enter together. A module that is not spread is left as it is.
    """
    units = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not units:
        yield
        return
    reshard(module)
    with _plain_parameters(module), _plain_modules(cast(list[Any], units)):
        yield


@contextmanager
def _plain_parameters(module: nn.Module) -> Iterator[None]:
    made: dict[int, nn.Parameter] = {}  # a tied one once
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if isinstance(parameter, DTensor):
                    if id(parameter) not in made:
                        made[id(parameter)] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
                    kept.append((owner, name, parameter))
        for owner, name, parameter in kept:
            owner._parameters[name] = made[id(parameter)]
        yield
    finally:
        for owner, name, parameter in kept:
            owner._parameters[name] = parameter


@contextmanager
def _plain_modules(units: list[nn.Module]) -> Iterator[None]:
    """Of their own classes, without FSDP's hooks, and without the methods that it wraps on a module, as Trainer has it
    do with `generate`."""
    classes = [type(unit) for unit in units]
    methods = [{name: own for name, own in vars(unit).items() if hasattr(own, "__wrapped__")} for unit in units]
    hooks = [(table, dict(table)) for unit in units for table in (getattr(unit, name) for name in _HOOKS)]
    try:
        for unit, cls, wrapped in zip(units, classes, methods):
            unit.__class__ = cls.__mro__[cls.__mro__.index(FSDPModule) + 1]
            for name in wrapped:
                del vars(unit)[name]
        for table, all_of_them in hooks:
            for key, hook in all_of_them.items():
                if _is_of_fsdp(hook):
                    del table[key]
        yield
    finally:
        for unit, cls, wrapped in zip(units, classes, methods):
            unit.__class__ = cls
            vars(unit).update(wrapped)
        for table, all_of_them in hooks:
            table.clear()
            table.update(all_of_them)


def _is_of_fsdp(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)  # state-dict hooks are wrapped
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.fsdp")
