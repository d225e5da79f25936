"""Numbers that a compiled step computes once and keeps."""

from __future__ import annotations

from torch import Tensor


def once(x: Tensor) -> Tensor:
    """The same numbers. A compiler puts what they are computed from (a rotation, an activation) into the loops that use
    them, and works it out anew for every column or every row of a matrix; a view of given strides it takes from memory.
    """
    return x.as_strided(x.shape, x.stride())
