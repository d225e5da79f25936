"""What a device holds, looked at without waiting for it.

A GPU works behind what it is told. Whoever asks it for a value, how many tokens are targets for instance, waits until
all that it was told before is done, and meanwhile tells it nothing. What a batch holds is known before it is sent: a
tensor that was sent from here has its original, and questions are put to that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Original(NamedTuple):
    """A tensor on the host, and the versions of it and of what was made of it, which writing into either changes."""

    host: Tensor
    versions: tuple[int, int]


_originals: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by tensor on a device, while that lives


def on_host(tensor: Tensor) -> Tensor:
    """A tensor's values on the CPU: itself, or the original that was sent. Where there is none, or one of both was
    written into since, they are fetched, which waits for the device."""
    if tensor.device.type == "cpu":
        return tensor
    original = original_of(tensor)
    if original is None:
        original = tensor.cpu()
        _remember(original, tensor)
    return original


def original_of(tensor: Tensor) -> Tensor | None:
    """What a tensor on a device was made of on the host, if that is known and neither was written into since."""
    known = None if tensor.device.type == "cpu" else _originals.get(tensor)
    return known.host if known is not None and known.versions == (known.host._version, tensor._version) else None


def send(tensors: Sequence[Tensor], device: torch.device | str | int, *, non_blocking: bool = False) -> list[Tensor]:
    """Tensors on a device. To a GPU they go in one copy per dtype, which nobody waits for: it is made of pinned memory
    of its own, so that theirs may be written into at once.

    Args:
        tensors: from anywhere. device, non_blocking: as `torch.Tensor.to` takes them.
    """
    here = [tensor.device.type == "cpu" for tensor in tensors]
    if torch.device(device).type == "cuda" and all(here):
        sent = _staged(tensors, device)
    else:
        sent = [tensor.to(device, non_blocking=non_blocking) for tensor in tensors]
    for original, one in zip(tensors, sent):
        _remember(original, one)
    return sent


def brought(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, by way of its original on the host, if that is known; itself if it is there."""
    if tensor.device == device:
        return tensor
    original = original_of(tensor)
    return tensor.to(device) if original is None else send([original], device)[0]


def _staged(tensors: Sequence[Tensor], device: torch.device | str | int) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[place].flatten() for place in places]).pin_memory()
        parts = flat.to(device, non_blocking=True).split([tensors[place].numel() for place in places])
        found |= {place: part.view(tensors[place].shape) for place, part in zip(places, parts)}
    return [found[place] for place in range(len(tensors))]


def _remember(host: Tensor, tensor: Tensor) -> None:
    apart = host.device.type == "cpu" and tensor.device.type != "cpu"
    if apart and not (host.is_inference() or tensor.is_inference()):  # those have no versions
        _originals[tensor] = _Original(host, (host._version, tensor._version))
