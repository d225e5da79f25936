"""Every input that once showed a bug, and some new ones: nothing comes of them but success or an error of ours.

`make fuzz` tries a hundred thousand. What an input is, and what is asked of it: `watch.py`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from fuzz.inputs import from_bytes, from_grammar
from fuzz.targets import MODULES, target
from fuzz.watch import Watch

CORPUS = Path(__file__).parent / "corpus"
FEW = {
    "checkpoints": 4,
    "settings": 6,
    "server": 12,
    "realtime": 3,
    "sounds": 60,
    "pictures": 60,
    "tars": 40,
    "tensors": 40,
}
"""New inputs in the tests."""


@pytest.mark.parametrize("name", MODULES)
def test_old_and_new_inputs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIPPER_CACHE", str(tmp_path))
    chosen, old = target(name), CORPUS / name
    with chosen.around(), Watch(chosen.run) as watch:
        for file in sorted(old.iterdir()) if old.is_dir() else []:
            if (bug := watch.check(file.read_bytes())) is not None:
                raise AssertionError(f"{file.name}: {bug.kind}\n{bug.told}")
        make = from_grammar if chosen.inputs is not None else from_bytes
        make(chosen, FEW.get(name, 15), 20261129, watch.check)
        for bug in watch.tally.bugs.values():
            raise AssertionError(f"{bug.kind}\n{bug.data[:1000]!r}\n{bug.told}")
        assert watch.tally.inputs >= FEW.get(name, 15)


def test_valid_inputs_are_accepted() -> None:
    """Else all that is made of them would be refused for the same reason."""
    for name in ("sounds", "pictures", "tars", "shards"):
        chosen = target(name)
        with Watch(chosen.run) as watch:
            for seed in chosen.seeds:
                assert watch.check(seed) is None
            assert watch.tally.accepted == len(chosen.seeds), watch.tally.reasons


def _reads_outside(data: bytes, folder: Path) -> None:
    (folder.parent / "secret.txt").read_bytes()


def _asks_the_network(data: bytes, folder: Path) -> None:
    import socket

    socket.create_connection(("127.0.0.1", 9), timeout=0.1)


def _unpickles(data: bytes, folder: Path) -> None:
    import pickle

    pickle.loads(pickle.dumps(os.getcwd))


def _takes_memory(data: bytes, folder: Path) -> None:
    np.ones(60 << 20, np.uint8)


def _takes_time(data: bytes, folder: Path) -> None:
    while True:
        pass


def _lets_a_librarys_error_through(data: bytes, folder: Path) -> None:
    np.zeros(3) + np.zeros(2)


def _runs_a_command(data: bytes, folder: Path) -> None:
    os.system("true")


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (_reads_outside, "open"),
        (_asks_the_network, "socket"),
        (_unpickles, "pickle"),
        (_runs_a_command, "os.system"),
        (_takes_memory, "large"),
        (_takes_time, "slow"),
        (lambda data, folder: {}["a"], "KeyError"),
        (lambda data, folder: int("a"), "nothing"),
    ],
)
def test_the_watch_sees(run: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no input may do is seen, also if what did it catches every exception."""
    monkeypatch.setattr("fuzz.watch.PATIENCE", 0.2 if kind == "slow" else 10.0)
    monkeypatch.setattr("fuzz.watch.MEBIBYTES", 50.0)
    with Watch(run) as watch:
        bug = watch.check(b"")
        assert (bug is None) == (kind == "nothing")
        assert bug is None or kind in bug.kind + bug.told
        if kind != "nothing":
            return
    with Watch(_swallows) as watch:
        assert watch.check(b"") is not None


def test_what_was_slow_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An input was called slow on a machine that did other work, at seconds of the processor twice its usual ones."""
    monkeypatch.setattr("fuzz.watch.CPU_SECONDS", 0.05)
    slow = [True, False]

    def run(data: bytes, folder: Path) -> None:
        until = time.process_time() + (0.1 if not slow or slow.pop(0) else 0.0)
        while time.process_time() < until:
            pass
        raise ValueError

    with Watch(run) as watch:
        assert watch.check(b"") is None
        assert (watch.tally.inputs, watch.tally.refused, watch.tally.accepted) == (1, 1, 0)
        assert (bug := watch.check(b"")) is not None
        assert bug.kind == "slow"


def _swallows(data: bytes, folder: Path) -> None:
    try:
        _reads_outside(data, folder)
    except BaseException:
        return
