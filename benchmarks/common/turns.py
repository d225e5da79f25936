"""Works that take turns in one process.

The speed of a machine changes from minute to minute: what counts is the ratio of two times of the same turn, and the
median of that over the turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Times = dict[Name, list[float]]
"""Seconds in every turn, by what was done."""


def device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes, the device's own work included."""
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def turns(works: Mapping[Name, Callable[[], Any]], repeats: int) -> Times[Name]:
    """Every work in every turn, in the order given; the first turn warms up and is not counted."""
    taken: Times[Name] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            spent = seconds(work)
            if turn:
                taken[name].append(spent)
    return taken


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the turns' ratios."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
