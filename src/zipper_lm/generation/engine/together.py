"""Documents of several requests that are read in one pass, where a pass costs more than its tokens.

They are padded to the longest, and what was read is split again: each has the state that it would have alone, up to the
rounding of float32. So only towers of float32 are read so; in fewer bits a document would depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import State
from zipper_lm.generation.engine.step import empty_cache
from zipper_lm.generation.request import Request

WASTE = 1.25
"""Tokens with padding for each without, at most."""


def pending_tokens(request: Request) -> int:
    """How many tokens of one document are to be read."""
    return sum(len(s.ids or []) + 2 for s in request.documents[0] if s.modality in request.pending)


def can_share(model: ZippedTowers, name: str) -> bool:
    """Whether what a tower keeps of a row can be cut out of a batch: float32 keys and values of every token."""
    tower = model.tower(name)
    if tower.interface.cache is None or any(p.dtype != torch.float32 for p in tower.backbone.parameters()):
        return False
    cache = empty_cache(tower)
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def companions(first: Request, others: Sequence[Request], most: int) -> list[Request]:
    """Those of the others that are read with one: of the same towers, nothing read yet, about as long, and with it not
    more than `most` tokens, padding included."""
    size = pending_tokens(first)
    alike = [(pending_tokens(o), o) for o in others if o.pending == first.pending and not o.state.segments]
    found, sizes = [], [size]
    for other, request in sorted(alike, key=lambda pair: abs(pair[0] - size)):
        padded = (len(sizes) + 1) * max(*sizes, other)
        if padded > most or padded > WASTE * (sum(sizes) + other):
            break
        sizes.append(other)
        found.append(request)
    return found


def read_together(requests: Sequence[Request]) -> None:
    """Read what is pending of requests of one document each, of which nothing was read."""
    first = requests[0]
    whole = Request(
        first.model, [d for r in requests for d in r.documents], [names for r in requests for names in r.involved]
    )
    whole.read_pending()
    for row, request in enumerate(requests):
        request.state, request.pending = _row(first.model, whole.state, row), []


def _row(model: ZippedTowers, state: State, row: int) -> State:
    """The state of one row alone; padding is on the left."""
    begin = {name: int((segments[row] < 0).sum()) for name, segments in state.segments.items()}
    found = State()
    for name, cache in state.caches.items():
        found.caches[name] = empty_cache(model.tower(name))
        for own, layer in zip(found.caches[name].layers, cache.layers, strict=True):
            own.update(*(t[row : row + 1, :, begin[name] :].clone() for t in (layer.keys, layer.values)))
        found.segments[name] = state.segments[name][row : row + 1, begin[name] :]
        found.positions[name] = state.positions[name][row : row + 1, begin[name] :]
        found.handover[name] = state.handover[name][row : row + 1]
    for (reader, source), memories in state.memories.items():
        found.memories[reader, source] = [memory.row(row, begin[source]) for memory in memories]
    return found
