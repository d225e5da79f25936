"""A progress bar for one stretch of work; lines where there is no terminal to draw on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def bar(console: Console, what: str, *, transient: bool = False) -> Iterator[Callable[..., None]]:
    """Yields ``advance(done, total, note)``; total and note may be left out.

    Where there is no terminal, such as in a log file, a line is printed at every tenth of the way.

    Args:
        console: where it is drawn. what: its name. transient: whether it goes away when it is done.
    """
    if not console.is_terminal:
        yield _Lines(console, what)
        return
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    columns += (TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, transient=transient) as progress:
        task = progress.add_task(what.ljust(28), total=None, note="")

        def advance(done: int, total: int | None = None, note: Any = "") -> None:
            progress.update(task, completed=done, total=total, note=_shown(note))

        yield advance


def _shown(note: Any) -> str:
    return f"loss {note:.3f}" if isinstance(note, float) else str(note)


class _Lines:
    def __init__(self, console: Console, what: str) -> None:
        self.console, self.what = console, what
        self.started, self.tenths, self.total = time.monotonic(), 0, 0

    def __call__(self, done: int, total: int | None = None, note: Any = "") -> None:
        self.total = total or self.total
        tenths = 10 * done // self.total if self.total else 0
        if tenths > self.tenths:
            self.tenths = tenths
            seconds = time.monotonic() - self.started
            self.console.print(f"{self.what} {done}/{self.total}, {seconds:.0f} s {_shown(note)}".rstrip())
