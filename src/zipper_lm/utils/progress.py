"""A progress bar for one stretch of work; lines where there is no terminal to draw on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")
SECONDS = 5.0
"""At least so long between two lines."""
WATCHED = 10.0
"""At most so long at first, while someone may be watching."""
LONGEST = 600.0
"""At most so long after this time."""
BESIDE = 70
"""Columns of what stands beside a bar; where they are all there are, the bar is short, and nothing is cut off."""


def plain_console(**settings: Any) -> Console:
    """Where text is shown as it is: ``[a]`` in a path is no markup, and ``:cat:`` no picture."""
    return Console(markup=False, emoji=False, **settings)


def warn(console: Console, what: str, message: object) -> None:
    """What is amiss, in colour, and why."""
    console.print(Text.assemble((f"{what}:", "yellow"), f" {message}"))


@contextmanager
def bar(console: Console, what: str, *, transient: bool = False) -> Iterator[Callable[..., None]]:
    """Yields ``advance(done, total, note)``; total and note may be left out. Throughput is of what follows the first
    call: so tell first what is done already.

    Where there is no terminal, such as in a log file, a line is printed at every tenth of the way, and every ten
    seconds in the first ten minutes, then every ten minutes; none of what takes a few seconds.

    Args:
        console: where it is drawn. what: its name. transient: whether it goes away when it is done.
    """
    if console.quiet:  # a bar would swallow what others print
        yield lambda *_: None
        return
    if not console.is_terminal:
        yield _Lines(console, what)
        return
    wide = max(8, min(40, console.width - BESIDE))
    columns: tuple[ProgressColumn, ...] = (TextColumn("{task.description}"), BarColumn(wide), MofNCompleteColumn())
    columns += (_Throughput(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, transient=transient, speed_estimate_period=600) as progress:
        task = progress.add_task(what.ljust(22), total=None, note="")

        def advance(done: int, total: int | None = None, note: Any = "") -> None:
            progress.update(task, completed=done, total=total, note=_shown(note))

        yield advance


def barred(steps: Iterable[T], console: Console, what: str, total: int | None = None) -> Iterator[T]:
    """The steps, one by one, with a bar that goes away.

    Args:
        steps: what is gone through. console, what: as of `bar`. total: how many; `None` is their length, if they have
            one.
    """
    if total is None and isinstance(steps, Sized):
        total = len(steps)
    with bar(console, what, transient=True) as advance:
        advance(0, total)
        for done, step in enumerate(steps, 1):
            yield step
            advance(done, total)


_console: ContextVar[Console | None] = ContextVar("console", default=None)


@contextmanager
def show_on(console: Console) -> Iterator[None]:
    """Within, what is far below a command, such as the fit of a codec, tells here how far it is: see `run_bar`."""
    token = _console.set(console)
    try:
        yield
    finally:
        _console.reset(token)


@contextmanager
def run_bar(what: str) -> Iterator[Callable[..., None]]:
    """A `bar` that goes away, on the console of the run, by `show_on`; nothing at all where there is none."""
    console = _console.get()
    if console is None:
        yield lambda *_: None
        return
    with bar(console, what, transient=True) as advance:
        yield advance


def _shown(note: Any) -> str:
    return f"loss {note:.3f}" if isinstance(note, float) else str(note)


class _Throughput(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g}/s" if task.speed else "")


class _Lines:
    def __init__(self, console: Console, what: str) -> None:
        self.console, self.what = console, what
        self.started = self.told = time.monotonic()
        self.total, self.tenths = 0, 0
        self.first: int | None = None

    def __call__(self, done: int, total: int | None = None, note: Any = "") -> None:
        self.total = total or self.total
        tenths, now = 10 * done // self.total if self.total else 0, time.monotonic()
        if self.first is None:  # what is gone on with was not done here
            self.first, self.tenths = done, tenths
        gap, longest = now - self.told, WATCHED if now - self.started <= LONGEST else LONGEST
        if (tenths > self.tenths and gap >= SECONDS) or gap >= longest:
            self.tenths, self.told = tenths, now
            seconds, line = now - self.started, f"{self.what} {done}" + (f"/{self.total}" if self.total else "")
            if rate := (done - self.first) / seconds:
                line += f", {rate:.3g}/s, {seconds:.0f} s"
                line += f", {(self.total - done) / rate:.0f} s left" if self.total else ""
            self.console.print(f"{line} {_shown(note)}".rstrip(), soft_wrap=True)
