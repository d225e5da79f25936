"""`zipper prepare --engine ray` on a cluster of two workers on this machine. Run by `make test-ray`."""

from __future__ import annotations

import contextlib
import csv
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from tiny_recipes import TONES, say, tiny_recipe

from zipper_lm.jobs.prepare import prepare

pytest.importorskip("ray.data", reason="needs the extra `ray`")
pytestmark = pytest.mark.slow
ROWS, SHARD = 240, 3
PATIENCE = 240.0
"""Seconds, for a machine that does other things, too."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head that does no work, and two workers with a processor each."""
    import ray
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # where Ray's token lies
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        made.workers = [made.add_node(num_cpus=1) for _ in range(2)]
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        patch.undo()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words and their tones, some of which are not there."""
    folder = tmp_path_factory.mktemp("raw")
    draw = np.random.default_rng(0)
    (folder / "train").mkdir()
    with (folder / "train" / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "transcription", "speaker"])
        for number in range(ROWS):
            text = " ".join(draw.choice(list(TONES), size=draw.integers(1, 4)))
            if number not in (7, 100):
                soundfile.write(folder / "train" / f"{number}.wav", say(text), 16_000)
            table.writerow([f"{number}.wav", text, "odd" if number % 2 else "even"])
    return folder


def recipe(raw: Path, folder: Path, limit: int = 2) -> Any:
    return tiny_recipe(folder / "m", data={"source": str(raw), "validation": None, "broken_limit": limit})


@pytest.fixture(scope="module")
def local(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the local engine writes."""
    folder = tmp_path_factory.mktemp("local")
    prepare(recipe(raw, folder), folder / "ids", shard_rows=SHARD)
    return contents(folder / "ids")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def working() -> list[psutil.Process]:
    """Processes of Ray that write shards now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Map"):
                found.append(process)
    return found


@pytest.mark.parametrize("what", ["worker", "machine"])
def test_shards_are_those_of_the_local_engine_although_one_is_killed(
    what: str, cluster: Any, raw: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed as by the kernel for memory, or a machine that is gone, in the midst of its shards."""
    killed: list[int] = []
    notes = tmp_path / "ids.preparing" / "train"

    def kill() -> None:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and not killed:
            done, busy = len(list(notes.glob("*.json"))) if notes.is_dir() else 0, working()
            if done >= 2 and len(busy) == 2:
                if what == "worker":
                    busy[0].kill()
                else:
                    cluster.remove_node(cluster.workers.pop(), allow_graceful=False)
                killed.append(done)
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    told = prepare(recipe(raw, tmp_path), tmp_path / "ids", shard_rows=SHARD, processes=2, engine="ray")
    thread.join()
    assert killed
    assert killed[0] < ROWS // SHARD - 2, "all was done before anything was killed"
    assert told["broken"] == 2
    assert contents(tmp_path / "ids") == local
    assert not list(tmp_path.glob("*.preparing"))


def test_what_is_broken_is_told_in_the_order_of_the_rows(cluster: Any, raw: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"more broken items than data\.broken_limit=1, the first are .*csv:9: "):
        prepare(recipe(raw, tmp_path, limit=1), tmp_path / "ids", shard_rows=SHARD, processes=2, engine="ray")
    assert not (tmp_path / "ids").exists()
    prepare(recipe(raw, tmp_path), tmp_path / "ids", shard_rows=SHARD, engine="local", resume=True)  # goes on with it
