"""Random numbers that are drawn from a state of their own."""

from __future__ import annotations

import random

import numpy as np
import torch

from zipper_lm.utils.randomness import draws_of, randomness_kept


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_randomness_is_kept() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    with randomness_kept():
        drawn()
    assert drawn() == expected


def test_draws_are_those_of_their_numbers() -> None:
    def of(seed: int, number: int) -> float:
        with draws_of(seed, number):
            return float(torch.rand(()))

    torch.manual_seed(3)
    found = [of(2**61, 0), of(2**61, 1), of(5, 1)]
    after = float(torch.rand(()))
    torch.manual_seed(3)
    assert after == float(torch.rand(()))
    assert len(set(found)) == 3
    assert found == [of(2**61, 0), of(2**61, 1), of(5, 1)]
