"""Weights are watched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from zipper_lm.generation.engine.watch import Watch


def write(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[1][0].weight[0, 0] += 1  # type: ignore[index]


def replace_parameter(model: nn.Sequential) -> None:
    model[0].bias = nn.Parameter(torch.zeros(3))


def narrow(model: nn.Sequential) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [write, replace_parameter, narrow])
def test_another_number_after_a_change_of_parameters(change: Callable[[nn.Sequential], None]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    watch = Watch(model)
    before = watch.version()
    assert watch.version() == before is not None
    change(model)
    assert watch.version() not in (before, None)


def test_none_once_a_module_is_another() -> None:
    """The same parameters in another order would go unseen, and those of a new module."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    watch, before = Watch(model), Watch(model).version()
    model[1][0] = nn.Linear(3, 3)  # type: ignore[index]
    assert watch.version() is None
    assert Watch(model).version() not in (before, None)
