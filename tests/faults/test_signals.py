"""A run that is told to end, by SIGTERM or by Ctrl-C, ends in order and goes on later as if it had not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Count, Find
from tests.faults.runs import Zygote, left_behind
from tests.faults.scenes import EXPERIMENT, FUSE, PREPARE, SAVE_EVERY, Scene
from tests.faults.test_kill import as_if_nothing_had_been, drawn, go_on, lost_steps

PLACES = {FUSE: 9, PREPARE: 3, EXPERIMENT: 6}
CASES = [
    pytest.param(scene, index, id=f"{scene.name}-{index}", marks=pytest.mark.slow)
    for scene, number in PLACES.items()
    for index in range(number)
]


@pytest.mark.parametrize(("scene", "index"), CASES)
def test_sigterm(scene: Scene, index: int, zygote: Zygote, reference: Find, tmp_path: Path, count: Count) -> None:
    count(f"SIGTERM to {scene.name}")
    known = reference(scene)
    number, phase, what = drawn(known.moments, index, seed=3)
    folder = scene.lay(tmp_path / "run")
    running = zygote.start(folder, scene.words, fault={"at": number, "do": "terminate"})
    told = running.wait()
    if told.status != 0:  # after the last step there is nothing to stop, and before the end it may be too late
        assert told.status == 128 + signal.SIGTERM, f"{phase}: {what}: {told.told}"
        assert told.errors, told.told
        assert "Traceback" not in told.told
    assert not left_behind(running.number)
    if told.status != 0:
        after = go_on(zygote, scene, folder)
        assert after.status == 0, f"{phase}: {what}: {after.told}"
        assert all(lost <= SAVE_EVERY for lost in lost_steps(told, after).values())
    as_if_nothing_had_been(folder, known)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(4))
def test_ctrl_c_twice(index: int, zygote: Zygote, reference: Find, tmp_path: Path, count: Count) -> None:
    """The second one ends it at once, without a checkpoint."""
    count("Ctrl-C twice")
    known = reference(FUSE)
    number, phase, what = drawn([m for m in known.moments if m[1] in ("step", "save", "evaluation")], index, seed=4)
    folder = FUSE.lay(tmp_path / "run")
    running = zygote.start(folder, FUSE.words, fault={"at": number, "do": "interrupt twice"})
    told = running.wait()
    assert told.status == 128 + signal.SIGINT, f"{phase}: {what}: {told.told}"
    assert "interrupted" in told.errors
    assert "Traceback" not in told.told
    assert not left_behind(running.number)
    after = go_on(zygote, FUSE, folder)
    assert after.status == 0, f"{phase}: {what}: {after.told}"
    as_if_nothing_had_been(folder, known)
