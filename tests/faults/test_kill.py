"""kill -9 at moments drawn from all phases of a command: the next run goes on, and ends as if nothing had been.

Weights and records are those of a run that was left alone, bit for bit, times apart; at most a save interval is lost;
nothing is left over, on the disk or among the processes.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.conftest import Count, Find, Reference
from tests.faults.runs import Ended, Zygote, contents, left_behind, listing
from tests.faults.scenes import EXPERIMENT, FUSE, PLAIN, PREPARE, SAVE_EVERY, Scene

KILLS = {FUSE: 20, PREPARE: 20, EXPERIMENT: 20, PLAIN: 4}
IN_EVERY_RUN = {(PREPARE, 3), (PLAIN, 2)}
"""Those that `make test` has too."""


def drawn(moments: list[tuple[int, str, str]], index: int, seed: int = 0) -> tuple[int, str, str]:
    """A moment of the phase whose turn it is."""
    phases = list(dict.fromkeys(phase for _, phase, _ in moments))
    turn = phases[index % len(phases)]
    return random.Random(f"{seed} {index}").choice([moment for moment in moments if moment[1] == turn])


def go_on(zygote: Zygote, scene: Scene, folder: Path) -> Ended:
    """The next run: with ``--resume``, or from the start where that says that there is nothing to go on from."""
    ended = zygote.run(folder, scene.again)
    if ended.status == 2 and "nothing to resume" in ended.told:
        ended = zygote.run(folder, scene.words)
    return ended


def lost_steps(before: Ended, after: Ended) -> dict[str, int]:
    """Steps that were done before and had to be done again, by training."""
    last = dict(before.steps)
    first: dict[str, int] = {}
    for name, step in after.steps:
        first.setdefault(name, step)
    return {name: last[name] - first[name] + 1 for name in last if name in first}


def as_if_nothing_had_been(folder: Path, reference: Reference) -> None:
    """What is there after the next run is what a run that was left alone leaves."""
    assert listing(folder) == reference.listing
    differ = {name for name, digest in contents(folder).items() if reference.contents.get(name) != digest}
    assert not differ


CASES = [
    pytest.param(
        scene, index, id=f"{scene.name}-{index}", marks=[] if (scene, index) in IN_EVERY_RUN else pytest.mark.slow
    )
    for scene, number in KILLS.items()
    for index in range(number)
]


@pytest.mark.parametrize(("scene", "index"), CASES)
def test_a_killed_run_goes_on(
    scene: Scene, index: int, zygote: Zygote, reference: Find, tmp_path: Path, count: Count
) -> None:
    count(f"kill -9 of {scene.name}")
    known = reference(scene)
    number, phase, what = drawn(known.moments, index)
    folder = scene.lay(tmp_path / "run")
    running = zygote.start(folder, scene.words, fault={"at": number, "do": "kill"})
    killed = running.wait()
    assert killed.status == -9, f"{phase}: {what}: {killed.told}"
    assert not left_behind(running.number)
    after = go_on(zygote, scene, folder)
    assert after.status == 0, f"{phase}: {what}: {after.told}"
    assert all(lost <= SAVE_EVERY for lost in lost_steps(killed, after).values()), f"{phase}: {what}"
    as_if_nothing_had_been(folder, known)
