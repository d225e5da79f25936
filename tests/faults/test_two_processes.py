"""One of two processes that train together dies or hangs: the other one ends by itself, and says which it was."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Count
from tests.faults.runs import (
    Zygote,
    beside,
    contents,
    left_behind,
    listing,
    read_moments,
    several,
)
from tests.faults.scenes import DDP_TIMEOUT, SAVE_EVERY, TOGETHER
from tests.faults.test_kill import drawn, lost_steps
from zipper_lm.utils.processes import ROLL_CALL_SECONDS

KILLS = 20
SLACK = 30.0
"""Seconds that a loaded machine may be late."""


class Together:
    """What two processes leave that are left alone, and the moments of each."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        TOGETHER.lay(folder)
        notes = {rank: beside(folder) / f"moments-{rank}" for rank in range(2)}
        ended = [running.wait() for running in several(zygote, folder, TOGETHER.words, notes=notes)]
        assert [each.status for each in ended] == [0, 0], ended
        self.moments = {rank: read_moments(file) for rank, file in notes.items()}
        self.contents, self.listing = contents(folder), listing(folder)


@pytest.fixture(scope="module")
def together(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Together:
    return Together(zygote, tmp_path_factory.mktemp("together") / "run")


def drawn_late(moments: list[tuple[int, str, str]], index: int, seed: int) -> tuple[int, str, str]:
    """As `drawn`, of what comes once the processes have found each other."""
    first = next(number for number, phase, _ in moments if phase in ("begin", "step", "prefixes"))
    return drawn([moment for moment in moments if moment[0] > first], index, seed)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(KILLS))
def test_one_of_two_is_killed(index: int, zygote: Zygote, together: Together, tmp_path: Path, count: Count) -> None:
    count("kill -9 of one of two processes")
    rank = random.Random(index).randrange(2)
    number, phase, what = drawn_late(together.moments[rank], index, seed=1)
    folder = TOGETHER.lay(tmp_path / "run")
    running = several(zygote, folder, TOGETHER.words, {rank: {"at": number, "do": "kill"}})
    killed = running[rank].wait()
    assert killed.status == -9, killed.told
    died = time.monotonic()
    other = running[1 - rank].wait()
    if other.status != 0:  # it may have been done
        assert time.monotonic() - died < ROLL_CALL_SECONDS + SLACK, f"{phase}: {what}"
        assert other.status == 2, f"{phase}: {what}: {other.told}"
        assert [line for line in other.errors if f"rank {rank} of 2 died" in line], f"{phase}: {what}: {other.told}"
    assert not [process for each in running for process in left_behind(each.number)]
    after = [each.wait() for each in several(zygote, folder, TOGETHER.again)]
    if all(each.status == 2 and "nothing to resume" in each.told for each in after):
        after = [each.wait() for each in several(zygote, folder, TOGETHER.words)]
    assert [each.status for each in after] == [0, 0], f"{phase}: {what}: {after}"
    assert all(lost <= SAVE_EVERY for lost in lost_steps(killed, after[rank]).values())
    assert listing(folder) == together.listing
    assert contents(folder) == together.contents, f"{phase}: {what}"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_hangs(rank: int, zygote: Zygote, together: Together, tmp_path: Path, count: Count) -> None:
    """It was two hours, unless somebody had set it, and an error of sockets that named no process."""
    count("one of two processes hangs")
    moments = [moment for moment in together.moments[rank] if moment[2] == "backward begins"]
    folder = TOGETHER.lay(tmp_path / "run")
    running = several(zygote, folder, TOGETHER.words, {rank: {"at": moments[1][0], "do": "stop"}})
    begun = time.monotonic()
    other = running[1 - rank].wait()
    try:
        assert other.status == 2, other.told
        assert time.monotonic() - begun < DDP_TIMEOUT + 2 * ROLL_CALL_SECONDS + 2 * SLACK
        told = "hung for longer than the time limit (training.arguments.ddp_timeout)"
        assert [line for line in other.errors if f"rank {rank} of 2 died" in line and told in line], other.told
    finally:
        running[rank].kill()
    after = [each.wait() for each in several(zygote, folder, TOGETHER.words)]
    assert [each.status for each in after] == [0, 0], after
    assert (listing(folder), contents(folder)) == (together.listing, together.contents)
