"""The rate of a small network's training."""

from __future__ import annotations

import pytest
import torch

from zipper_lm.utils.schedules import one_cycle


@pytest.mark.parametrize("steps", range(1, 30))
def test_any_number_of_steps_has_a_schedule(steps: int) -> None:
    """Nine steps, a tenth of which and one more is a rise of no length, ended in a division by zero."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    schedule, rates = one_cycle(optimizer, 1.0, steps), []
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert all(0 < rate <= 1 for rate in rates[:-1])
    assert rates[-1] < 0.01
