"""Inputs of a target, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from fuzz.target import Target
from hypothesis import HealthCheck, Phase, given, seed, settings

BATCH = 1000
"""Inputs of one draw by hypothesis, which remembers all of them."""


def from_grammar(target: Target, count: int, start: int, check: Callable[[bytes], None]) -> None:
    """So many inputs of a strategy; the same for the same start."""
    assert target.inputs is not None
    done = 0
    while done < count:
        now = min(BATCH, count - done)
        left = now

        def one(data: bytes) -> None:
            nonlocal left
            if left:
                left -= 1
                check(data)

        chosen = settings(
            max_examples=now,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        seed(start + done)(chosen(given(target.inputs)(one)))()
        done += now


def from_bytes(target: Target, count: int, start: int, check: Callable[[bytes], None]) -> None:
    """So many changes of the seeds and of what was made of them, without anything that leads; the same for the same
    start."""
    assert target.change is not None
    draw, pool = Random(start), list(target.seeds)
    for _ in range(count):
        data = target.change(draw.choice(pool), draw)
        check(data)
        if draw.random() < 0.1:
            pool.append(data)
            if len(pool) > 200:
                pool.pop(draw.randrange(len(target.seeds), len(pool)))
