"""What a family does after its layers, done for single states: its own final norm, head, and what else there is.

The logits of a whole batch are the largest thing in a training step where the vocabulary is large: 16 documents of 512
tokens make 4 GiB of them with 128 thousand ids, and three times that in float32. So they are made of a few targets at a
time, and made again in the backward pass. A family's own `forward` makes them, with the states handed to it that left
its last layer: then no layer is computed. That these are all that it needs is tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zipper_lm.fusion.interface import COARSE, FEW, FINE, Interface, embedding_of, is_quantized, plain_ids, trial
from zipper_lm.fusion.tower import LayerList, depth_of, listening, own_layers
from zipper_lm.utils.host import send
from zipper_lm.utils.shapes import has_values

HELD = 2**25
"""Numbers of logits that may be made at once, if it can be helped; 128 MiB of them in float32."""

TRIED = (3, 5)  # batch and time


def are_many(tokens: int, ids: int) -> bool:
    """Whether the logits of so many tokens are not to be made at once."""
    return tokens * ids > HELD


def tokens_at_once(ids: int) -> int:
    """How many tokens' logits are made at once then."""
    return max(1, HELD // ids)


@dataclass(frozen=True)
class Head:
    """See this file's beginning.

    Attributes:
        backbone, layers, interface: of a tower, or of a decoder that is none. depth: number of its layer calls.
        token: id that stands in the place of those that were read.
    """

    backbone: nn.Module
    layers: LayerList
    interface: Interface
    depth: int
    token: int

    def __call__(self, states: Tensor) -> Tensor:
        """Logits ``[tokens, vocab]`` of states ``[tokens, hidden]`` that left the last layer and its zips."""
        ids = torch.full((len(states), 1), self.token)
        ids, mask = send([ids, torch.ones_like(ids)], embedding_of(self.backbone).device)
        with listening(self.layers, Last(self.depth), {self.depth - 1: states[:, None]}):
            return self.interface.call(self.backbone, ids, mask)[0][:, 0]


class Last:
    """A listener that changes nothing and keeps the state after the last layer."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.state: Tensor

    def before(self, depth: int, hidden_states: Tensor) -> Tensor:
        """As it came."""
        return hidden_states

    def after(self, depth: int, hidden_states: Tensor) -> Tensor:
        """As it came."""
        if depth == self.depth - 1:
            self.state = hidden_states
        return hidden_states


class _Found(NamedTuple):
    """What was found of a backbone; names, as modules may be exchanged: the layer list, the number of layer calls, and
    the id to call the head with."""

    path: str
    depth: int
    token: int


_found: WeakKeyDictionary[nn.Module, _Found | None] = WeakKeyDictionary()  # by backbone; `None`: it has no head apart


def head_of(backbone: PreTrainedModel, interface: Interface, layers: str | None = None) -> Head | None:
    """The head of a backbone, if it can be had apart from a forward: that is tried once, and not on meta.

    Args:
        backbone: of a tower, or a decoder that is none: then its layer list becomes a `LayerList`. interface: its own.
            layers: dotted name of its layers, if that is known.
    """
    if backbone not in _found:
        if embedding_of(backbone).is_meta:
            return None
        _found[backbone] = _learn(backbone, interface, layers)
    found = _found[backbone]
    if found is None:
        return None
    known: LayerList = backbone.get_submodule(found.path)  # type: ignore[assignment]
    return Head(backbone, known, interface, found.depth, found.token)


def _learn(backbone: PreTrainedModel, interface: Interface, path: str | None) -> _Found | None:
    if FEW not in interface.takes:
        return None
    try:
        depth, path = depth_of(backbone, "decoder", path), own_layers(backbone, "decoder", path)
    except ValueError:
        return None
    layers: LayerList = backbone.get_submodule(path)  # type: ignore[assignment]
    ids = plain_ids(backbone, *TRIED)
    head, last = Head(backbone, layers, interface, depth, int(ids[-1, -1])), Last(depth)
    with trial(backbone), torch.autocast(ids.device.type, enabled=False):
        try:
            with listening(layers, last):
                whole = interface.call(backbone, ids)[0]
            few = interface.call(backbone, ids, logits=False)[0]
            apart = head(last.state.flatten(0, 1))
        except Exception:  # of any kind: what the family says where no layer has computed anything
            return None
    if few.shape[:2] != (TRIED[0], 1):
        return None
    if not has_values(whole):  # there is nothing to compare
        return _Found(path, depth, head.token)
    wanted = whole.flatten(0, 1).float()
    off, far = (apart.float() - wanted).norm(), (wanted - wanted.mean(0)).norm()
    exact = all(p.dtype in (torch.float32, torch.float64) for p in backbone.parameters()) and not is_quantized(backbone)
    return _Found(path, depth, head.token) if off <= (FINE if exact else COARSE) * far else None
