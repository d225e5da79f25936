"""The first random numbers of many generators at once.

Each document is drawn by a generator of its own, ``numpy.random.default_rng((seed, epoch, index))``, so that a draw
depends on nothing else. To make a million of them takes most of a minute. `first_randoms` gives their first numbers
without them: the same arithmetic, on arrays. NumPy keeps that of seeds and of bit generators as it is
(https://numpy.org/neps/nep-0019-rng-policy.html); that of seeds is from O'Neill 2015
(https://www.pcg-random.org/posts/developing-a-seed_seq-alternative.html), PCG64 from O'Neill 2014 (HMC-CS-2014-0905).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

_PART = 1 << 13  # indices at a time: what is made of them stays near the processor
_POOL = 4
_WORD = 0xFFFF_FFFF
_PCG = 0x2360_ED05_1FC6_5DA4_4385_DF64_9FCC_F645
Wide = tuple[np.ndarray, np.ndarray]
"""Numbers of 128 bits: the high and the low half, uint64 [many] each."""


def first_randoms(seeds: Sequence[int], many: int, count: int) -> np.ndarray:
    """What ``default_rng((*seeds, index)).random()`` gives when it is first called, and then.

    Args:
        seeds: from 0. many: indices, from 0. count: numbers of each.

    Returns:
        Numbers in [0, 1), float64 ``[count, many]``.
    """
    drawn = np.empty((count, many))
    for start in range(0, many, _PART):
        part = drawn[:, start : start + _PART]
        high, low, increment_high, increment_low = _seeded(seeds, np.arange(start, start + part.shape[1]))
        increment = (increment_high << 1 | increment_low >> 63, increment_low << 1 | 1)
        state = _step(_add(increment, (high, low)), increment)  # from zero, the first step gives the increment
        for row in part:
            state = _step(state, increment)
            turn = state[0] >> 58
            mixed = state[0] ^ state[1]
            turned = mixed >> turn | mixed << (-turn & 63)
            row[:] = (turned >> 11) * 2.0**-53
    return drawn


def _seeded(seeds: Sequence[int], indices: np.ndarray) -> Iterator[np.ndarray]:
    """What a `SeedSequence` of the seeds and each index gives: four times uint64 [many]."""
    words: list[np.ndarray] = [np.array([word], np.uint32) for seed in seeds for word in _words(seed)]
    words.append(indices.astype(np.uint32))
    spread = _Hash(0x43B0_D7E5, 0x931E_8875)
    nothing = np.zeros(1, np.uint32)
    pool = [spread(word) for word in (words + [nothing] * _POOL)[:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = _mix(pool[target], spread(pool[source]))
    for word in words[_POOL:]:
        for target in range(_POOL):
            pool[target] = _mix(pool[target], spread(word))
    told = _Hash(0x8B51_F9DD, 0x58F3_8DED)
    state = [np.broadcast_to(told(pool[n % _POOL]), indices.shape).astype(np.uint64) for n in range(8)]
    return (low | high << 32 for low, high in list(pairwise(state))[::2])


def _words(number: int) -> list[int]:
    """A number as 32-bit words, the lowest first."""
    return [number >> shift & _WORD for shift in range(0, max(1, number.bit_length()), 32)]


class _Hash:
    """Each call hashes with the next constant."""

    def __init__(self, constant: int, factor: int) -> None:
        self.constant, self.factor = constant, factor

    def __call__(self, value: np.ndarray) -> np.ndarray:
        value = value ^ np.uint32(self.constant)
        self.constant = self.constant * self.factor & _WORD
        value = value * np.uint32(self.constant)
        return value ^ value >> 16


def _mix(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    value: np.ndarray = first * np.uint32(0xCA01_F9DD) - second * np.uint32(0x4973_F715)
    return value ^ value >> 16


def _step(state: Wide, increment: Wide) -> Wide:
    """PCG64's next state: times a constant, plus the increment, modulo 2**128."""
    high, low = state
    times_high, times_low = np.uint64(_PCG >> 64), np.uint64(_PCG & (1 << 64) - 1)
    product = (_high_of(low, times_low) + high * times_low + low * times_high, low * times_low)
    return _add(product, increment)


def _add(first: Wide, second: Wide) -> Wide:
    low = first[1] + second[1]
    return first[0] + second[0] + (low < first[1]), low


def _high_of(numbers: np.ndarray, factor: np.uint64) -> np.ndarray:
    """The high half of the products, by halves of 32 bits."""
    half = np.uint64(32)
    mask = np.uint64(_WORD)
    high, low, factor_high, factor_low = numbers >> half, numbers & mask, factor >> half, factor & mask
    middle = high * factor_low + (low * factor_low >> half)
    other = low * factor_high + (middle & mask)
    return high * factor_high + (middle >> half) + (other >> half)
