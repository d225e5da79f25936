"""Tensors on a device that answer from their originals on the host, where somebody else's code asks.

transformers asks of every batch whether its mask has padding, and whether documents share its rows. These are questions
to a device, which is waited for (see `host.py`); here they are put to the original. Only functions by which such
questions are asked are followed on the host: with any other, and with other tensors, the tensor is an ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from zipper_lm.utils.host import original_of

_FOLLOWED: frozenset[Callable[..., Any]] = frozenset(
    {
        *(torch.nn.functional.pad, torch.diff, torch.all, torch.any, torch.sum, torch.cumsum),
        *(Tensor.all, Tensor.any, Tensor.sum, Tensor.cumsum, Tensor.diff, Tensor.bool, Tensor.long, Tensor.to),
        *(Tensor.__getitem__, Tensor.__contains__, Tensor.__invert__, Tensor.view, Tensor.reshape),
        *(Tensor.eq, Tensor.ne, Tensor.sub, Tensor.__eq__, Tensor.__ne__, Tensor.__sub__),
    }
)


class _Known(Tensor):
    """See this file's beginning.

    Attributes:
        original: the same values on the host. version: of the tensor when that was so.
    """

    original: Tensor
    version: int

    @property
    def still(self) -> bool:
        """Whether nobody wrote into it since."""
        return self._version == self.version

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = (args, dict(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            tensors = [value for value in tree_flatten(given)[0] if isinstance(value, Tensor)]
            there = tree_map(plain, given)
            if function not in _FOLLOWED or not all(isinstance(t, _Known) and t.still for t in tensors):
                return function(*there[0], **there[1])
            if function is Tensor.to:  # it would take the original along
                made = function(*there[0], **there[1])
                return _known(made, args[0].original.to(made.dtype))
            here = tree_map(lambda value: value.original if isinstance(value, _Known) else value, given)
            answer = function(*here[0], **here[1])
            if not isinstance(answer, Tensor) or answer.ndim == 0:
                return answer
            return _known(function(*there[0], **there[1]), answer)


def answering(tensor: Tensor) -> Tensor:
    """A tensor that answers from its original; itself if it is on the CPU, or was not sent from there."""
    original = original_of(tensor)
    return tensor if original is None or isinstance(tensor, _Known) else _known(tensor, original)


def plain(value: Any) -> Any:
    """An ordinary tensor of one that answers; anything else as it is."""
    if type(value) is not _Known:  # asked at every layer of every token
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


def _known(tensor: Tensor, original: Tensor) -> Tensor:
    found = tensor.as_subclass(_Known)
    found.original, found.version = original, found._version
    return found
