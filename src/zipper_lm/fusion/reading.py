"""Reading: finished segments go through all towers in lockstep; what they leave for later is a `State`."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zipper_lm.data.collation import Batch
from zipper_lm.data.packing import places
from zipper_lm.fusion.head import Head, are_many, head_of
from zipper_lm.fusion.lockstep import Board, lockstep
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.prefix import known_states
from zipper_lm.fusion.tower import Listener, Tower
from zipper_lm.fusion.zips import Memory, View
from zipper_lm.utils.host import brought, on_host, send


@dataclass
class State:
    """All that a request knows of what was read so far; explicit, so that any number of requests can run on one model.

    Attributes:
        caches: each tower's own cache.
        segments: per tower, int64 ``[batch, past]``: the segment number of every cached token, -1 for padding.
        positions: per tower, int64 ``[batch, past]``: each cached token's place in its segment.
        memories: per (reader, source), one `Memory` per zip layer, over the source's cached tokens.
        handover: per tower, ``[batch, towers + 1]``: who speaks next, as said at the tower's last EOS.
    """

    caches: dict[str, Any] = field(default_factory=dict)
    segments: dict[str, Tensor] = field(default_factory=dict)
    positions: dict[str, Tensor] = field(default_factory=dict)
    memories: dict[tuple[str, str], list[Memory]] = field(default_factory=dict)
    handover: dict[str, Tensor] = field(default_factory=dict)

    def goes_on(self, tower: Tower) -> bool:
        """Whether several tokens can be added at once to what a tower has read; else it reads everything again."""
        cache = tower.interface.cache
        return cache is not None and cache.several and tower.name in self.caches

    def fork(self, tower: str) -> State:
        """A state that goes on from this one by tokens of one tower, and leaves this one as it is."""
        caches = {name: copy.deepcopy(cache) if name == tower else cache for name, cache in self.caches.items()}
        return State(caches, dict(self.segments), dict(self.positions), dict(self.memories), dict(self.handover))

    def forget(self, tower: str) -> None:
        """Drop what one tower has read, to read it anew."""
        for store in (self.caches, self.segments, self.positions, self.handover):
            store.pop(tower, None)
        for reader, source in list(self.memories):
            if source == tower:
                del self.memories[reader, source]


@dataclass
class Reading:
    """What one pass gives.

    Attributes:
        logits: per tower ``[batch, time, vocab]``, of those whose logits were made.
        finals: per tower, the state after its last layer and zip ``[batch, time, hidden]``.
    """

    logits: dict[str, Tensor]
    finals: dict[str, Tensor]


def visible(reader_segments: Tensor, source_segments: Tensor) -> Tensor:
    """bool ``[batch, Q, M]``: a source token is visible if its segment comes earlier (and is not padding)."""
    source = brought(source_segments, reader_segments.device)[:, None, :]
    return (source < reader_segments[:, :, None]) & (source >= 0)


def visible_between(reader: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Tensor:
    """`visible` of two sides of a batch; where documents share rows, within a document only."""
    seen = visible(reader["segments"], source["segments"])
    if "documents" in reader:
        seen &= brought(source["documents"], seen.device)[:, None, :] == reader["documents"][:, :, None]
    return seen


def is_packed(batch: Batch) -> bool:
    """Whether documents share its rows."""
    return any("documents" in side for side in batch.values())


def rows_that_see(reader: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Tensor | None:
    """The rows of a batch in which something is visible between two of its sides, int64 on the CPU; the first row if
    there are none, `None` if it is so in all."""
    here, there = on_host(reader["segments"]), on_host(source["segments"])
    documents = [_documents(side) for side in (reader, source)]
    numbers = torch.cat([side.flatten() for side in documents]).unique(return_inverse=True)[1]
    mine, theirs = numbers.split([side.numel() for side in documents])
    never = torch.iinfo(there.dtype).max
    begun = there.where(there >= 0, never).flatten()
    earliest = torch.full_like(numbers, never).scatter_reduce(0, theirs, begun, "amin")
    sees = (here > earliest[mine].view_as(here)).any(1)
    if sees.all():
        return None
    found = sees.nonzero()[:, 0]
    return found if len(found) else found.new_zeros(1)


def _documents(side: Mapping[str, Tensor]) -> Tensor:
    """The number of each token's document, int64 ``[batch, time]`` on the CPU."""
    if "documents" in side:
        return on_host(side["documents"])
    segments = side["segments"]
    return torch.arange(len(segments))[:, None].expand(segments.shape)


class _Pass:
    """One pass over a batch: the views, the memories made on the way, and the updates that lockstep asks for."""

    def __init__(self, model: ZippedTowers, batch: Batch, state: State | None) -> None:
        self.model, self.batch, self.state = model, batch, state or State()
        self.board: Board = {}
        self.fresh: dict[tuple[str, str], dict[int, Memory]] = defaultdict(dict)
        self.views: dict[tuple[str, str], View] = {}
        self.rows: dict[tuple[str, str], Tensor] = {}
        self.finals: dict[str, Tensor] = {}
        self.posts: dict[str, set[int]] = defaultdict(set)
        self.needs: dict[str, dict[int, list[tuple[str, int]]]] = defaultdict(lambda: defaultdict(list))
        keep = state is not None  # memories for readers that are not in this batch
        self._told = ["segments", *(["documents"] if is_packed(batch) else [])]
        for (reader, source), pairs in model.layer_pairs.items():
            if source in batch and (keep or reader in batch):
                self.posts[source].update(m for _, m in pairs)
                if reader in batch:
                    for layer, m in pairs:
                        self.needs[reader][layer].append((source, m))
            if reader in batch and (source in batch or source in self.state.segments):
                seen = visible_between(batch[reader], {key: self._source(key, source) for key in self._told})
                view = self.views[reader, source] = View.of(seen)
                # In training, a zip works on the rows that see something only: where one task reads and the other
                # writes, that is half of them. At least one row, so that every parameter has a gradient.
                if keep or not torch.is_grad_enabled():
                    continue
                rows = rows_that_see(batch[reader], batch[source])
                if rows is not None:
                    (rows,) = send([rows], seen.device)
                    self.rows[reader, source], self.views[reader, source] = rows, view.take(rows)

    def _source(self, key: str, source: str) -> Tensor:
        past = getattr(self.state, key, {}).get(source)
        parts = ([] if past is None else [past]) + ([self.batch[source][key]] if source in self.batch else [])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def enter(self, name: str, depth: int, hidden_states: Tensor) -> Tensor:
        return self.model.project_input(name, depth, hidden_states, self.batch[name]["involved"])

    def memory(self, reader: str, source: str, k: int) -> Memory:
        """All of `source` that zip layer k of `reader` may look at; what is new is made once."""
        past = self.state.memories.get((reader, source))
        if source not in self.batch:
            assert past is not None
            return past[k]
        made = self.fresh[reader, source]
        if k not in made:
            m = self.model.layer_pairs[reader, source][k][1]
            layer = self.model.zip_layer(reader, source, k)
            states, positions = self.board[source, m], self.batch[source]["positions"]
            if (rows := self.rows.get((reader, source))) is not None:
                states, positions = states[brought(rows, states.device)], brought(positions, rows.device)[rows]
            else:
                positions = brought(positions, layer.q_proj.weight.device)
            made[k] = layer.remember(states, positions, None if past is None else past[k])
        return made[k]

    def update(self, name: str, depth: int, hidden_states: Tensor) -> Tensor:
        """All zips of one tower at one depth. Each reads the layer's own output, so their order does not matter."""
        result = hidden_states
        for (reader, source), pairs in self.model.layer_pairs.items():
            if reader != name or (reader, source) not in self.views:
                continue
            for k, (layer, _) in enumerate(pairs):
                if layer == depth:
                    zip_layer = self.model.zip_layer(reader, source, k)
                    memory = self.memory(reader, source, k)
                    view, positions = self.views[reader, source], self.batch[name]["positions"]
                    rows = self.rows.get((reader, source))
                    if rows is None:
                        result = result + zip_layer(hidden_states, positions, memory, view)
                    else:
                        update = zip_layer(hidden_states[rows], positions[rows], memory, view)
                        result = result.index_add(0, rows, update)
        if depth == self.model.tower(name).depth - 1:
            self.finals[name] = result
        return result


def read(model: ZippedTowers, batch: Batch, state: State | None = None, logits: bool = True) -> Reading:
    """Run a batch of finished (or, in training, whole) segments through their towers.

    Args:
        model: the model.
        batch: new tokens; with a `state`, tokens that go on from it.
        state: what was read before; it is extended by this batch in place. `None`: nothing before, nothing kept.
        logits: false leaves out those that are many, where `tower_head` can make them of `finals`.

    Raises:
        ValueError: with a `state`, for documents that share rows.
    """
    if state is not None and is_packed(batch):
        raise ValueError("documents that share rows cannot be gone on with: collate them without packing")
    batch = Batch({n: dict(zip(side, send([*side.values()], model.tower(n).device))) for n, side in batch.items()})
    this = _Pass(model, batch, state)
    forwards, made = {}, []
    for name, stream in batch.items():
        mask = stream["attention_mask"]
        cache = None
        if state is not None and name in state.segments:
            mask = torch.cat([(state.segments[name] >= 0).long(), mask], 1)
            cache = state.caches[name]
        tower = model.tower(name)
        positions = None
        if "documents" in stream:
            (positions,) = send([places(on_host(stream["documents"]))], tower.device)
        known = known_states(model, name, stream) if state is None else None
        where: dict[str, Any] = {"attention_mask": mask} if positions is None else {"positions": positions}
        many = are_many(stream["input_ids"].numel(), tower.head_size)
        few = many and not logits and tower_head(tower) is not None
        made += [] if few else [name]
        how: dict[str, Any] = {"cache": cache, "use_cache": state is not None, "known": known, "logits": not few}
        forwards[name] = partial(_forward, tower, stream["input_ids"], where | how)
    outputs = lockstep(forwards, this.board, this.posts, this.needs, this.enter, this.update)
    if state is not None:
        _extend(state, this, {name: cache for name, (_, cache) in outputs.items()})
    return Reading({name: outputs[name][0] for name in outputs if name in made}, this.finals)


def tower_head(tower: Tower) -> Head | None:
    """What makes a tower's logits of single states, if it can be had apart."""
    return head_of(tower.backbone, tower.interface, tower.layers_path)


def _forward(tower: Tower, input_ids: Tensor, how: Mapping[str, Any], listener: Listener) -> tuple[Tensor, Any]:
    return tower(input_ids, listener=listener, **how)


def _extend(state: State, this: _Pass, caches: dict[str, Any]) -> None:
    """Add what a pass made to the state it went on from."""
    for reader, source in this.model.layer_pairs:
        if source in this.batch:
            count = len(this.model.layer_pairs[reader, source])
            state.memories[reader, source] = [this.memory(reader, source, k).contiguous() for k in range(count)]
    for name, stream in this.batch.items():
        state.caches[name] = caches[name]
        state.segments[name] = this._source("segments", name)
        state.positions[name] = this._source("positions", name)
        state.handover[name] = this.model.handover_logits(name, this.finals[name], stream)
