"""A disk that is full, or cannot be written to: one line says so, what was there stays, and later the run goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Count, Find
from tests.faults.runs import Ended, Zygote
from tests.faults.scenes import EXPERIMENT, FUSE, PLAIN, PREPARE, Scene
from tests.faults.test_kill import as_if_nothing_had_been, drawn, go_on

PLACES = {FUSE: 20, PREPARE: 8, EXPERIMENT: 12}
"""How many writes of each command find no space."""
SIZES = (64, 256, 400, 700)
"""KiB of a disk that is too small."""

CASES = [
    pytest.param(
        scene, index, id=f"{scene.name}-{index}", marks=[] if (scene, index) == (PREPARE, 3) else pytest.mark.slow
    )
    for scene, number in PLACES.items()
    for index in range(number)
]


def one_line(ended: Ended, *words: str) -> None:
    """It ended with exit code 2 and one line, which has one of these words in it."""
    assert ended.status == 2, ended.told
    assert "Traceback" not in ended.told
    (line,) = ended.errors
    assert any(word in line for word in words), line


@pytest.mark.parametrize(("scene", "index"), CASES)
def test_a_write_that_finds_no_space(
    scene: Scene, index: int, zygote: Zygote, reference: Find, tmp_path: Path, count: Count
) -> None:
    """From one write on there is no space: in checkpoints, shards, logs, records, labels, caches and outputs."""
    count(f"full disk in {scene.name}")
    known = reference(scene)
    writes = [m for m in known.moments if m[2].startswith(("open", "os.mkdir")) or "in the middle" in m[2]]
    number, phase, what = drawn(writes, index, seed=2)
    folder = scene.lay(tmp_path / "run")
    full = zygote.run(folder, scene.words, fault={"at": number, "do": "full"})
    if full.status != 0 or "cache" not in what:  # what is only remembered is done without
        one_line(full, "No space left on device")
    after = full if full.status == 0 else go_on(zygote, scene, folder)
    assert after.status == 0, f"{phase}: {what}: {after.told}"
    as_if_nothing_had_been(folder, known)


@pytest.mark.parametrize("scene", [PREPARE, pytest.param(PLAIN, marks=pytest.mark.slow)], ids=lambda s: s.name)
def test_nothing_can_be_written(scene: Scene, zygote: Zygote, tmp_path: Path, count: Count) -> None:
    """The output's folder is read-only: it is said before long work."""
    count(f"read-only output of {scene.name}")
    folder = scene.lay(tmp_path / "run")
    before = {path.name for path in folder.iterdir()}
    ended = zygote.run(folder, scene.words, fault={"at": 1, "do": "read-only"})
    one_line(ended, "Read-only file system")
    assert not ended.steps
    assert {path.name for path in folder.iterdir()} - {"tmp"} == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own; its size is changed by `resize`."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def resize(disk: Path, how: str) -> None:
    """Give a disk another size, or have it read-only."""
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kib", SIZES)
def test_a_small_disk(kib: int, zygote: Zygote, reference: Find, disk: Path, count: Count) -> None:
    """A real one: whatever library writes meets it."""
    count("a disk that is too small")
    known = reference(PLAIN)
    resize(disk, "size=64m")
    folder = PLAIN.lay(disk / "run")
    used = int(subprocess.run(["du", "-sk", disk], capture_output=True, text=True, check=True).stdout.split()[0])
    resize(disk, f"size={used + kib}k")
    one_line(zygote.run(folder, PLAIN.words, aside=disk.parent), "No space left on device")
    resize(disk, "size=64m")
    after = go_on(zygote, PLAIN, folder)
    assert after.status == 0, after.told
    as_if_nothing_had_been(folder, known)


@pytest.mark.slow
def test_a_disk_that_is_mounted_read_only(zygote: Zygote, disk: Path, count: Count) -> None:
    count("a disk that is mounted read-only")
    resize(disk, "size=64m")
    folder = PLAIN.lay(disk / "run")
    (folder / "tmp").mkdir()
    resize(disk, "ro")
    one_line(zygote.run(folder, PLAIN.words, aside=disk.parent), "Read-only file system")
