"""How processes are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zipper_lm.utils.interruption import Interrupted, signal_of, terminable


def test_sigterm_is_met_as_ctrl_c_is() -> None:
    """It ended a process at once, as batch systems send it: no checkpoint, and temporary folders stayed."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as caught, terminable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal_of(caught.value) == signal.SIGTERM
    assert signal_of(KeyboardInterrupt()) == signal_of(Interrupted("kept")) == signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) == before


PARENT = """
import os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from zipper_lm.utils.interruption import end_with_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, get_context("spawn"), end_with_parent)
    told = {pool.submit(os.getpid).result() for _ in range(2)}
    pool.submit(time.sleep, 60)
    print(*told, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_children_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Each kept its gigabyte for ever, waiting for work from a process that was gone."""
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.run([sys.executable, tmp_path / "parent.py"], capture_output=True, text=True, timeout=60)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    children = [int(number) for number in parent.stdout.split()]
    assert children
    for _ in range(100):
        if not any(alive(child) for child in children):
            return
        time.sleep(0.1)
    for child in children:
        os.kill(child, signal.SIGKILL)
    pytest.fail("still there")


def alive(process: int) -> bool:
    """Whether it runs; one that has ended, but that nobody has asked for, does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
