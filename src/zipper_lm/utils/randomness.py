"""Random numbers that are drawn from a state of their own, so that nobody else's change."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Whatever is drawn inside, Python's, numpy's and torch's global generators go on as if nothing had been."""
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global one is what is kept)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def draws_of(seed: int, number: int) -> Iterator[None]:
    """What torch draws inside depends on two numbers from 0 on, on nothing that was drawn before."""
    with randomness_kept():
        torch.manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        yield


def new_seed() -> int:
    """Drawn from torch's global generator."""
    return int(torch.randint(2**62, ()))
