"""One of two processes that train together dies or hangs: the other one ends by itself, and says which it was."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.conftest import Count, Find
from tests.faults.runs import (
    PATIENCE,
    Zygote,
    beside,
    contents,
    left_behind,
    listing,
    read_moments,
    several,
    without_times,
)
from tests.faults.scenes import DDP_TIMEOUT, EXPERIMENT, PREPARE, SAVE_EVERY, TOGETHER
from tests.faults.test_kill import drawn, lost_steps
from zipper_lm.experiments.records import read_records
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


@pytest.mark.slow
@pytest.mark.parametrize("index", range(4))
def test_one_of_two_that_share_an_experiment_is_killed(
    index: int, zygote: Zygote, reference: Find, tmp_path: Path, count: Count
) -> None:
    """The other one does what is left."""
    count("kill -9 of one of two that share an experiment")
    known = reference(EXPERIMENT)
    number, phase, what = drawn(known.moments, index, seed=5)
    folder = EXPERIMENT.lay(tmp_path / "run")
    first = zygote.start(folder, EXPERIMENT.words, fault={"at": number, "do": "kill"})
    second = zygote.start(folder, EXPERIMENT.words)
    killed, other = first.wait(), second.wait()
    assert killed.status in (-9, 0)  # it may have had less to do than alone
    assert other.status == 0, f"{phase}: {what}: {other.told}"
    assert not left_behind(first.number)
    after = zygote.run(folder, EXPERIMENT.words)
    assert (after.status, after.steps) == (0, []), after.told
    assert listing(folder) == known.listing
    assert records_of(folder) == records_of(known.folder)


def records_of(folder: Path) -> dict[str, Any]:
    """Those of an experiment, by name: their order is that in which they were made."""
    plan, records = read_records(folder / "out.jsonl")
    plain = json.dumps([plan, records]).replace(str(folder.parent.resolve()), "")
    return without_times(json.loads(plain))


@pytest.mark.slow
@pytest.mark.parametrize("who", ["worker", "main"])
def test_one_that_encodes_is_killed(who: str, zygote: Zygote, reference: Find, tmp_path: Path, count: Count) -> None:
    """While the first shards are written, by two processes."""
    count("kill -9 in prepare by two processes")
    known = reference(PREPARE)
    folder = PREPARE.lay(tmp_path / "run")
    running = zygote.start(folder, [*PREPARE.words, "--processes", "2"])
    end = time.monotonic() + PATIENCE
    while not list(folder.glob("out.preparing/*/*")) and not (folder / "out").exists() and time.monotonic() < end:
        time.sleep(0.001)
    workers = [p.pid for p in psutil.Process(running.number).children() if "spawn_main" in " ".join(p.cmdline())]
    with suppress(ProcessLookupError):
        os.kill(workers[0] if who == "worker" and workers else running.number, signal.SIGKILL)
    told = running.wait()
    if who == "main":
        assert told.status in (-9, 0)
    elif told.status not in (-9, 0):  # all may have been written, and no worker be there any more
        assert told.status == 2, told.told
        assert "a process ended before its work was done" in told.errors[0]
    assert not left_behind(running.number)
    after = told if told.status == 0 else zygote.run(folder, [*PREPARE.again, "--processes", "2"])
    assert after.status == 0, after.told
    assert (listing(folder), contents(folder)) == (known.listing, known.contents)
