"""Many generators at once: number for number what each of them gives."""

from __future__ import annotations

import numpy as np
import pytest

from zipper_lm.data import draws
from zipper_lm.data.draws import first_randoms


@pytest.mark.parametrize("seeds", [(0, 0), (7, 1), (2**32 - 1, 3), (2**40 + 3, 5), (2**100, 2**33), (5,), (1, 2, 3, 4)])
def test_the_numbers_are_numpys(seeds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "_PART", 16)
    found = first_randoms(seeds, 40, 3)
    for index in range(40):
        generator = np.random.default_rng((*seeds, index))
        assert found[:, index].tolist() == [generator.random() for _ in range(3)]
