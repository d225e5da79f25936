"""What a captured step knows of its rows: tensors of known size at fixed addresses, and their copies on the host.

R rows, C columns, M memory tokens, H heads of a zip, D width of a tower's hidden state, T towers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import State
from zipper_lm.fusion.zips import Memory, View
from zipper_lm.generation.engine.reach import SPARE, Reach

LEAST = 64


def bucket(number: int) -> int:
    """The next power of two, from `LEAST` on; none for nothing: sizes are few, for each is compiled once."""
    return 0 if number == 0 else max(LEAST, 1 << (number - 1).bit_length())


@dataclass
class Seat:
    """Where a row's segment lies.

    Attributes:
        begin: the column of its stream's first token. first: the column of its segment's BOS. end: the column behind
            its last token that was read, once it rests; `None` while it writes. memory: by source, how many tokens it
            reads.
    """

    begin: int
    first: int
    end: int | None = None
    memory: dict[str, int] = field(default_factory=dict)


class Rows:
    """Buffers of one tower's rows, whichever segments they write.

    Args:
        model: the model. name: the tower that writes. count: R. columns: C. memory: by source, M.

    Attributes:
        column: int64 ``[1]``: where the next token is written. begin: int64 ``[R]``: where each row's stream begins.
        place: int64 ``[R]``: of the token that is read next, in its segment. ids: int64 ``[R]``: that token.
        active: bool ``[R]``. involved: bool ``[R, T]``.
        memories: by source, one `Memory` ``[R, H, M + SPARE, C]`` for each zip layer. allowed: by source, bool ``[R, 1,
            1, M + SPARE]``. seen: by source, bool ``[R, 1, 1]``. reach: how much of columns and memories is read.
        kept: by depth, ``[R, C, D]``: states that others will read, as exactly as their zips do.
        at: `column` on the host. seats: of the rows that are taken.
    """

    def __init__(
        self, model: ZippedTowers, name: str, count: int, columns: int, memory: Mapping[str, int], pad: int
    ) -> None:
        self.model, self.name, self.count, self.columns, self.pad = model, name, count, columns, pad
        tower = model.tower(name)
        device = tower.device
        self.at = 0
        self.reach = Reach(count, columns, {source: size for source, size in memory.items() if size}, device)
        self.seats: dict[int, Seat] = {}
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.begin, self.place = (torch.zeros(count, dtype=torch.long, device=device) for _ in range(2))
        self.ids = torch.full((count,), pad, device=device)
        self.active = torch.zeros(count, dtype=torch.bool, device=device)
        self.involved = torch.zeros(count, len(model.names), dtype=torch.bool, device=device)
        self.memories: dict[str, list[Memory]] = {}
        self.allowed: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        for source, size in memory.items():
            if not size:
                continue
            self.memories[source] = []
            for k in range(len(model.layer_pairs[name, source])):
                layer = model.zip_layer(name, source, k)
                shape = count, layer.heads, size + SPARE, layer.head_width
                zeros = (torch.zeros(shape, dtype=layer.dtype, device=layer.q_proj.weight.device) for _ in range(2))
                self.memories[source].append(Memory(*zeros))
            self.allowed[source] = torch.ones(count, 1, 1, size + SPARE, dtype=torch.bool, device=device)
            self.seen[source] = torch.zeros(count, 1, 1, dtype=torch.bool, device=device)
        width = tower.hidden_size
        self.kept = {
            depth: torch.zeros(count, columns, width, dtype=dtype, device=device)
            for depth, dtype in _dtypes_kept(model, name).items()
        }

    def memory_sizes(self) -> dict[str, int]:
        """M of each source."""
        return self.reach.most_memory()

    def readable(self, source: str, k: int) -> tuple[Memory, View]:
        """What is read of a source at one of its zip layers, ``[r, H, m, C]``, and what every row may read of it: all
        that it has."""
        size, memory, here = len(self.reach.memory[source]), self.memories[source][k], self.reach.here
        part = Memory(here(memory.keys)[:, :, :size], here(memory.values)[:, :, :size])
        return part, View(here(self.allowed[source])[..., :size], here(self.seen[source]))

    def reach_out(self) -> None:
        """See that the next step reads whatever a row that writes has."""
        writing = {row: seat.memory for row, seat in self.seats.items() if seat.end is None}
        memory = {s: max((m.get(s, 0) for m in writing.values()), default=0) for s in self.memories}
        self.reach.set(writing.keys(), self.at + 1, memory)

    def free(self) -> list[int]:
        """The rows that nobody has."""
        return [row for row in range(self.count) if row not in self.seats]

    def tensors(self) -> list[Tensor]:
        """All buffers that a step reads or writes at a fixed address."""
        flat = [self.column, self.begin, self.place, self.ids, self.active, self.involved, *self.kept.values()]
        for memories in self.memories.values():
            flat += [t for memory in memories for t in (memory.keys, memory.values)]
        return [*flat, *self.allowed.values(), *self.seen.values()]

    def progress(self) -> list[Tensor]:
        """What a step moves on, and reads in the next one."""
        return [self.column, self.place, self.ids]

    # --- who comes and goes --------------------------------------------------------------------------------------

    def sit(self, row: int, past: int, bos: int, involved: Tensor, state: State | None) -> None:
        """Take a row for a segment; its past is in the columns before `at` already.

        Args:
            past: tokens of its stream before. bos: the first one to be read. involved: bool ``[T]``. state: whose
                memories it reads, of one document; `None`: it sees nothing.
        """
        self.seats[row] = Seat(self.at - past, self.at)
        self.begin[row], self.place[row], self.ids[row], self.active[row] = self.at - past, 0, bos, True
        self.involved[row] = involved.to(self.involved.device)
        for source, memories in self.memories.items():
            segments = None if state is None else state.segments.get(source)
            size = 0 if segments is None else segments.shape[1]
            self.seen[source][row] = bool(size)
            self.seats[row].memory[source] = size
            if state is None or segments is None or not size:
                continue
            here = torch.arange(self.allowed[source].shape[-1], device=self.allowed[source].device) < size
            here[:size] &= segments[0].to(here.device) >= 0
            self.allowed[source][row, 0, 0] = here
            for own, given in zip(memories, state.memories[self.name, source]):
                own.keys[row, :, :size] = given.keys[0]
                own.values[row, :, :size] = given.values[0]

    def rest(self, row: int) -> None:
        """A row writes no more, and keeps what it has read."""
        self.seats[row].end = self.at
        self.active[row], self.ids[row] = False, self.pad
        for seen in self.seen.values():
            seen[row] = False

    def leave(self, row: int) -> None:
        """Free a row."""
        self.rest(row)
        del self.seats[row]

    def part(self, row: int, depth: int, begin: int, end: int) -> Tensor:
        """A copy of kept states, ``[1, end - begin, D]``."""
        return self.kept[depth][row : row + 1, begin:end].clone()

    def move(self, by: int) -> None:
        """Everything moves by so many columns, to the right where positive."""
        self.at += by
        self.column += by
        self.begin += by
        for seat in self.seats.values():
            seat.begin, seat.first = seat.begin + by, seat.first + by
            seat.end = None if seat.end is None else seat.end + by
        for states in self.kept.values():
            states.copy_(states.roll(by, 1))

    def room(self) -> int:
        """By how many columns everything can move left."""
        return min((seat.begin for seat in self.seats.values()), default=self.at)

    # --- within a step -------------------------------------------------------------------------------------------

    def mask(self) -> Tensor:
        """int64 ``[r, c]``, of the columns that are read: 1 for the tokens of each row's stream, the one that is read
        included. A free row has that one alone."""
        columns = self.reach.columns
        begin = self.reach.here(torch.where(self.active, self.begin, self.column))
        return ((columns >= begin[:, None]) & (columns <= self.column)).long()

    def positions(self) -> Tensor:
        """int64 ``[r, 1]``: of the token that is read, in its stream."""
        return self.reach.here(torch.where(self.active, self.column - self.begin, 0))[:, None]

    def write(self, ids: Tensor) -> None:
        """The ids ``[r]`` that are read next."""
        ids = torch.where(self.reach.here(self.active), ids, self.pad)
        if self.reach.rows is None:
            self.ids.copy_(ids)
        else:
            self.ids.index_copy_(0, self.reach.rows, ids)

    def keep(self, depth: int, states: Tensor) -> None:
        """The states ``[r, 1, D]`` of a token that others will read."""
        kept, states = self.kept[depth], states.to(self.kept[depth].dtype)
        if self.reach.rows is None:
            kept.index_copy_(1, self.column, states)
        else:
            kept.index_put_((self.reach.rows, self.column), states[:, 0])

    def advance(self) -> None:
        """One token further."""
        self.column.add_(1)
        self.place.add_(1)


def _dtypes_kept(model: ZippedTowers, name: str) -> dict[int, torch.dtype]:
    """By depth, the dtype that holds a tower's states as exactly as the zips that read them do; the states themselves
    may have another than the tower's weights."""
    found: dict[int, torch.dtype] = {}
    for (reader, source), pairs in model.layer_pairs.items():
        for k, (_, depth) in enumerate(pairs if source == name else ()):
            own = model.zip_layer(reader, source, k).dtype
            found[depth] = torch.promote_types(own, found.get(depth, own))
    return found


def needed_memory(model: ZippedTowers, name: str, states: Sequence[State]) -> dict[str, int]:
    """By source that a tower reads, how many memory tokens the fullest of the states has."""
    sources = [source for reader, source in model.layer_pairs if reader == name]
    sizes = {s: [state.segments[s].shape[1] for state in states if s in state.segments] for s in sources}
    return {source: max(found, default=0) for source, found in sizes.items()}
