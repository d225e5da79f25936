"""How a process is ended: by Ctrl-C, by SIGTERM, which batch systems and containers send before they kill, and with its
parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Work was stopped by a signal; what its message says was kept.

    Attributes:
        by: number of the signal.
    """

    def __init__(self, message: str = "", by: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.by = by


def signal_of(error: KeyboardInterrupt) -> int:
    """The number of the signal that an interruption goes back to."""
    return error.by if isinstance(error, Interrupted) else signal.SIGINT


@contextmanager
def terminable() -> Iterator[None]:
    """In the block SIGTERM is met as Ctrl-C is, by `Interrupted`, where Python allows it: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise Interrupted(by=signal.SIGTERM)

    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def end_with_parent() -> None:
    """Have this process, which `multiprocessing` started, end when the one that started it is gone, however that ended.

    A killed process ends none of its children: they would wait for its next word for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()  # by a pipe, which breaks
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
