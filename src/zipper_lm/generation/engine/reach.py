"""How much of its buffers a step reads: the rows that write, and no further than some row has anything.

Buffers are as large as the longest stream may become, and attention costs what it reads. So on a CPU a step reads a
part of them, whose size is a number that the compiler does not know: it is compiled once. A CUDA graph reads at fixed
addresses, and all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

GRAIN = 32
"""Sizes are multiples of it: loops without a remainder."""
GRAIN_OF_ROWS = 8
LEAST_ROWS = 16
"""So many are computed at least: fewer would be multiplied otherwise (`weights.py`)."""
SPARE = 1
"""Tokens behind the last of a buffer. To a compiler all of a buffer would be another case than a part of it."""


class Reach:
    """What a step reads.

    Args:
        rows: R. columns: C. memory: by source, M. device: of the buffers.

    Attributes:
        varies: whether it is no more than what is used. chooses: whether rows that do not write are left out, too: a
            compiled step finds a row by its number, where another would copy what it has. rows: int64 ``[r]``, rising:
            the numbers of the rows that are computed; `None`: all. columns: int64 ``[c]``: the numbers of the columns
            that are read, from 0. memory: by source, int64 ``[m]``: of the tokens of memory.
    """

    def __init__(self, rows: int, columns: int, memory: Mapping[str, int], device: torch.device) -> None:
        self.count, self.device = rows, device
        self._columns = torch.arange(columns, device=device)
        self._memory = {source: torch.arange(size, device=device) for source, size in memory.items()}
        self.varies, self.columns, self.memory = device.type == "cpu", self._columns, dict(self._memory)
        self.chooses = False
        self.rows: Tensor | None = None
        self._writing: list[int] | None = None

    @property
    def most(self) -> int:
        """C."""
        return len(self._columns)

    def most_memory(self) -> dict[str, int]:
        """M of each source."""
        return {source: len(numbers) for source, numbers in self._memory.items()}

    def read_all(self) -> None:
        """All that there is, from now on."""
        self.varies, self.columns, self.memory = False, self._columns, dict(self._memory)
        self.chooses, self.rows = False, None

    def here(self, x: Tensor) -> Tensor:
        """Of what there is for every row, ``[R, ...]``, that of the rows that are computed, ``[r, ...]``."""
        return x if self.rows is None else x[self.rows]

    def choose_rows(self) -> None:
        """Rows that do not write are left out from now on."""
        self.chooses = self.varies and self.count > LEAST_ROWS
        self._writing = None

    def set(self, writing: Collection[int], columns: int, memory: Mapping[str, int]) -> None:
        """The next step is of these rows, and needs the first so many columns, and of each source so many tokens, if
        any."""
        if self.chooses and self._writing != (now := sorted(writing)):
            self._writing = now
            size = min(self.count, max(LEAST_ROWS, -(-len(now) // GRAIN_OF_ROWS) * GRAIN_OF_ROWS))
            others = [row for row in range(self.count) if row not in writing]
            self.rows = torch.tensor(sorted([*now, *others[: size - len(now)]]), device=self.device)
            torch._dynamo.mark_dynamic(self.rows, 0)
        if self.varies:
            self.columns = _part(self._columns, columns)
            self.memory = {source: _part(numbers, memory.get(source, 0)) for source, numbers in self._memory.items()}


def _part(numbers: Tensor, size: int) -> Tensor:
    part = numbers[: max(1, -(-size // GRAIN)) * GRAIN]
    torch._dynamo.mark_dynamic(part, 0)
    return part
