"""Progress bars of the demo, one style for rendering, training and scoring."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback


@contextmanager
def bar(console: Console, what: str) -> Iterator[Callable[..., None]]:
    """A bar for one stretch of work; yields ``advance(done, total, note)`` (total and note may be left out).

    Where there is no terminal to draw on, such as a log file, a line is printed at every tenth of the way.
    """
    if not console.is_terminal:
        yield _Lines(console, what)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console) as progress:
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


class _Steps(TrainerCallback):
    """Tells a bar about a Trainer's steps."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self.advance, self.note = advance, ""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.3f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(state.global_step, state.max_steps, self.note)


def train_with_bar(trainer: Trainer, console: Console, what: str) -> Any:
    """`trainer.train()` with our bar in place of the Trainer's own printing."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    with bar(console, what) as advance:
        trainer.add_callback(_Steps(advance))
        return trainer.train()
