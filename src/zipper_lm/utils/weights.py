"""What a file of weights holds, before anything is made for it: a config may claim any size, the file has only one.

So a module is first made on PyTorch's ``meta`` device, which takes no memory, and held against the file's header.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

M = TypeVar("M", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]


class TooMany(ValueError):
    """A module has more parameters than there can be."""


def stored_shapes(file: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, by name, off its header alone.

    Raises:
        ValueError: naming the file, if it is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read: missing or damaged ({error})") from error


def on_meta(what: str, make: Callable[[], M], most: int) -> M:
    """The module that `make` makes, without memory for its tensors.

    Args:
        what: the place of its sizes, for messages. make: called in here. most: parameters that it may have.

    Raises:
        TooMany: naming `what`, if it has more.
        ValueError: naming `what`, if it cannot be made, as for sizes that no tensor can have.
    """
    thread, made = threading.get_ident(), 0

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal made
        if threading.get_ident() != thread or parameter is None:
            return  # the hook is told of every module of the process
        made += 1
        if made > most:  # a million layers are no memory, but hours
            raise TooMany(f"{what}: asks for more than {most} tensors, the weights have fewer")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return make()
    except ValueError:
        raise
    except Exception as error:  # of classes that are not ours, each with its own kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{what}: sizes that no weights can have: {first}") from error
    finally:
        hook.remove()


def shapes_of(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The shapes of what a module stores, by name."""
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def check_shapes(what: str, stored: Shapes, needed: Shapes) -> None:
    """Raise `ValueError`, naming `what` and the first tensors at fault, unless stored tensors are those needed."""
    if wrong := sorted(stored.keys() ^ needed.keys()):
        raise ValueError(f"{what}: missing or extra tensors {wrong[:5]} ({len(wrong)})")
    for name in sorted(stored):
        if stored[name] != needed[name]:
            raise ValueError(f"{what}: {name} has shape {list(stored[name])}, the config asks for {list(needed[name])}")
