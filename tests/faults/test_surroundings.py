"""What a run stands on changes: its data, its processes, the clock."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import Count, Find
from tests.faults.runs import Zygote, left_behind
from tests.faults.scenes import FUSE, PLAIN, PREPARE, READING, Scene
from tests.faults.test_disk import one_line
from tests.faults.test_kill import as_if_nothing_had_been, go_on


@pytest.mark.slow
@pytest.mark.parametrize("scene", [FUSE, PREPARE], ids=lambda scene: scene.name)
def test_a_file_vanishes(scene: Scene, zygote: Zygote, reference: Find, tmp_path: Path, count: Count) -> None:
    """Of data that is read still: it is named; with the file put back, the run goes on."""
    count(f"a file of data vanishes under {scene.name}")
    known = reference(scene)
    number = next(n for n, phase, _ in known.moments if phase in ("begin", "shard"))
    folder = scene.lay(tmp_path / "run")
    file = tmp_path / "home" / "data" / ("validation" if scene is PREPARE else "train") / "3.wav"
    content = file.read_bytes()
    at = number if scene is PREPARE else 1
    one_line(zygote.run(folder, scene.words, fault={"at": at, "do": "remove", "file": str(file)}), "3.wav")
    file.write_bytes(content)
    after = go_on(zygote, scene, folder)
    assert after.status == 0, after.told
    as_if_nothing_had_been(folder, known)


@pytest.mark.slow
def test_a_process_that_reads_data_dies(zygote: Zygote, reference: Find, tmp_path: Path, count: Count) -> None:
    count("a process that reads data dies")
    known = reference(READING)
    # The first step of the second epoch: in the last of one, all may have been read.
    number = [n for n, _, what in known.moments if what == "backward begins"][3]
    folder = READING.lay(tmp_path / "run")
    running = zygote.start(folder, READING.words, fault={"at": number, "do": "kill children"})
    one_line(running.wait(), "a process that reads data died after step")
    assert not left_behind(running.number)
    after = go_on(zygote, READING, folder)
    assert after.status == 0, after.told
    as_if_nothing_had_been(folder, known)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["training_step begins", "_save_checkpoint begins"])
def test_the_clock_is_set_back(what: str, zygote: Zygote, reference: Find, tmp_path: Path, count: Count) -> None:
    """By a third of a year."""
    count("the clock is set back")
    known = reference(PLAIN)
    number = [n for n, _, told in known.moments if told == what][1]
    folder = PLAIN.lay(tmp_path / "run")
    ended = zygote.run(folder, PLAIN.words, fault={"at": number, "do": "set back"})
    assert ended.status == 0, ended.told
    as_if_nothing_had_been(folder, known)
