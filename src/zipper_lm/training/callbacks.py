"""What is told of training, and told to it, while it runs: a bar of its steps, its scores, and that it shall stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from zipper_lm.utils.processes import any_of
from zipper_lm.utils.progress import bar


class Interrupted(KeyboardInterrupt):
    """Training was stopped by the user after a checkpoint was written."""


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C (SIGINT) ends training after the step at hand, with a checkpoint; the second one at once.

    Attributes:
        stopped: whether that happened.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._old: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen for the signal, where Python allows it: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGINT, self._told)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if told to, in all processes after the same step."""
        self.stopped = any_of(self.stopped)
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True  # what is due to be scored, is: no resume will

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signal back."""
        self.release()
        self.stopped = self.stopped and state.global_step < state.max_steps

    def release(self) -> None:
        """Give the signal back, also after an error."""
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)
            self._old = None

    def _told(self, *_: Any) -> None:
        if self.stopped:
            self.release()
            raise KeyboardInterrupt
        self.stopped = True
        print("stopping after this step; a second Ctrl-C stops at once", file=sys.stderr)


def train_with_bar(trainer: Trainer, console: Console, what: str, checkpoint: str | None = None) -> TrainOutput:
    """`trainer.train()` with our bar in place of the Trainer's own printing.

    Args:
        trainer: with ``disable_tqdm`` in its arguments nothing is told. console: where it is told. what: the bar's
            name. checkpoint: folder to go on from; `None` starts anew.
    """
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    if trainer.args.disable_tqdm:
        return trainer.train(resume_from_checkpoint=checkpoint)
    with bar(console, what) as advance:
        trainer.add_callback(_Told(console, advance))
        return trainer.train(resume_from_checkpoint=checkpoint)


class _Told(TrainerCallback):
    """Tells a bar about a Trainer's steps, and a console about its scores."""

    def __init__(self, console: Console, advance: Callable[..., None]) -> None:
        self.console, self.advance, self.note = console, advance, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.3f}"
        if state.is_world_process_zero and (line := score_line(logs or {})):
            self.console.print(f"step {state.global_step}: {line}", soft_wrap=True, markup=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(state.global_step, state.max_steps, self.note)


def score_line(logs: dict[str, Any]) -> str:
    """The scores of one log; ``""`` if it has none. Gates and bookkeeping go to TensorBoard alone."""
    times = ("runtime", "per_second")
    shown = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_") and not k.endswith(times)}
    return ", ".join(f"{name} {float(v):.4g}" for name, v in shown.items())
