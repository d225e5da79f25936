"""Runs of `zipper` in processes of their own, what they leave, and what of that has to be equal."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
"""Seconds that any run here may take."""
TIMES = ("seconds", "seconds_training", "made_with", "scored_with")
TIME_ENDINGS = ("runtime", "per_second")
_OF_TIMES = ("logs", "locks", "hashes.json")
"""Folders whose files are named by the clock, or left on purpose; what is remembered of files not quite new."""


@dataclass
class Ended:
    """How a process ended: exit status as `subprocess` has it, `None` if it had to be killed; all it said; its steps,
    each as the folder of its training and its number."""

    status: int | None
    told: str
    steps: list[tuple[str, int]] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        """The lines that say what went wrong."""
        return [line for line in self.told.splitlines() if line.startswith(("error: ", "interrupted"))]


class Running:
    """A process that was started."""

    def __init__(self, zygote: Zygote, number: int, told: Path, steps: Path) -> None:
        self.zygote, self.number, self._told, self._steps = zygote, number, told, steps

    def kill(self) -> None:
        """End it, and all that it started."""
        os.killpg(self.number, signal.SIGKILL)
        self.zygote.ask({"wait": self.number, "seconds": PATIENCE})

    def wait(self, seconds: float = PATIENCE) -> Ended:
        """Until it ends, or is killed, with all that it started, after so long."""
        status = self.zygote.ask({"wait": self.number, "seconds": seconds})
        if status is None:
            self.kill()
        return Ended(status, self._told.read_text(errors="replace"), read_steps(self._steps))


class Zygote:
    """Starts commands by copies of a process that has imported everything (`tests/faults/zygote.py`)."""

    def __init__(self) -> None:
        known = [str(ROOT), str(ROOT / "tests"), str(ROOT / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(known), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._count = 0

    def ask(self, request: Mapping[str, Any]) -> Any:
        """The answer to a request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        folder: Path,
        words: Sequence[object],
        fault: Mapping[str, Any] | None = None,
        notes: Path | None = None,
        environment: Mapping[str, str] | None = None,
        aside: Path | None = None,
    ) -> Running:
        """A command.

        Args:
            folder: where it runs; its cache and its temporary files are there too. words: after ``zipper``.
            fault, notes: as of `Points`. environment: more of it.
            aside: where what it says is kept, if not `beside` the folder.
        """
        self._count += 1
        aside = aside or beside(folder)
        told, steps = aside / f"told-{self._count}", aside / f"steps-{self._count}"
        places = {"ZIPPER_CACHE": folder / "cache", "TMPDIR": folder / "tmp", "XDG_CACHE_HOME": folder / "cache"}
        (folder / "tmp").mkdir(exist_ok=True)
        points = {"fault": fault, "notes": None if notes is None else str(notes), "steps": str(steps)}
        number = self.ask(
            {
                "start": {
                    "folder": str(folder),
                    "words": [str(word) for word in words],
                    "told": str(told),
                    "environment": {name: str(place) for name, place in places.items()} | dict(environment or {}),
                    "points": points,
                }
            }
        )
        return Running(self, number, told, steps)

    def run(self, folder: Path, words: Sequence[object], **more: Any) -> Ended:
        """A command, to its end."""
        return self.start(folder, words, **more).wait()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def free_port() -> int:
    """One that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def several(
    zygote: Zygote,
    folder: Path,
    words: Sequence[object],
    faults: Mapping[int, Mapping[str, Any]] | None = None,
    notes: Mapping[int, Path] | None = None,
) -> list[Running]:
    """A command in two processes that train together, as a batch system starts them: without a launcher.

    Args:
        zygote: starts them. folder, words: as of `Zygote.start`. faults, notes: by rank.
    """
    names = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        zygote.start(
            folder,
            words,
            fault=(faults or {}).get(rank),
            notes=(notes or {}).get(rank),
            environment=names | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def beside(folder: Path) -> Path:
    """Where what is known of a folder's runs is kept: not in it."""
    aside = folder.with_name(f"{folder.name}.told")
    aside.mkdir(parents=True, exist_ok=True)
    return aside


def read_steps(file: Path) -> list[tuple[str, int]]:
    """The steps that a process began."""
    return [tuple(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def read_moments(file: Path) -> list[tuple[int, str, str]]:
    """What `Points` noted."""
    return [tuple(json.loads(line)) for line in file.read_text().splitlines()]


def left_behind(session: int, seconds: float = 10.0) -> list[str]:
    """The processes of a session that live still after so many seconds; they are ended."""
    end = time.monotonic() + seconds
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        if not found or time.monotonic() > end:
            break
        time.sleep(0.05)
    told = []
    for process in found:
        told.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
        process.kill()
    return told


def listing(folder: Path) -> set[str]:
    """All that is in a folder, by path, those apart that the clock names."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not any(part in _OF_TIMES for part in path.relative_to(folder).parts)
        and path != folder / "cache"  # which may be there for the latter alone
    }


def contents(folder: Path) -> dict[str, str]:
    """By path, a hash of what a file says, times apart."""
    return {
        name: _digest(folder / name, str(folder.parent.resolve()))
        for name in sorted(listing(folder))
        if (folder / name).is_file() and not name.startswith(("tmp/", "cache/"))
    }


def _digest(file: Path, place: str) -> str:
    content = file.read_bytes()
    if file.suffix != ".safetensors":
        content = content.replace(place.encode(), b"")
    if file.suffix in (".json", ".jsonl"):
        lines = [content] if file.suffix == ".json" else content.splitlines()
        content = json.dumps([without_times(json.loads(line)) for line in lines], sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def without_times(value: Any) -> Any:
    """A JSON value without what depends on the clock."""
    if isinstance(value, dict):
        return {
            key: without_times(each)
            for key, each in value.items()
            if key not in TIMES and not key.endswith(TIME_ENDINGS)
        }
    return [without_times(each) for each in value] if isinstance(value, list) else value
