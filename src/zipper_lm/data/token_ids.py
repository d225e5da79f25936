"""Token ids as data sets keep them: four bytes each, where a list takes up to 36."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np


class TokenIds(Sequence[int]):
    """Ids of one segment, not to be changed; equal to a list of the same ids, and to numpy an int32 ``[time]``.

    Args:
        ids: whole numbers. An int32 array is kept as it is, a mapped one too.

    Raises:
        ValueError: for an id that four bytes do not hold.
    """

    __slots__ = ("array",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, ids: Sequence[int] | np.ndarray) -> None:
        try:
            self.array: np.ndarray = np.asarray(ids, np.int32)
        except OverflowError as error:
            raise ValueError(f"ids must be below 2**31, got {max(ids, key=abs)}") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array, dtype) if copy else np.asarray(self.array, dtype)

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[int]:
        return iter(self.array.tolist())

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> TokenIds: ...

    def __getitem__(self, index: int | slice) -> int | TokenIds:
        return TokenIds(self.array[index]) if isinstance(index, slice) else int(self.array[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        return repr(list(self))
