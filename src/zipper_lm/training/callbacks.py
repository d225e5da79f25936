"""What is told of training, and told to it, while it runs: a bar of its steps, its scores, and that it shall stop."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from zipper_lm.training.recipe import TrainingRecipe
from zipper_lm.utils.interruption import Interrupted
from zipper_lm.utils.processes import any_of, largest_of
from zipper_lm.utils.progress import bar


def callbacks_of(recipe: TrainingRecipe) -> list[TrainerCallback]:
    """What a recipe's `save_every` and `patience` ask for."""
    return [SaveRegularly(recipe.save_every), *([EarlyStoppingCallback(recipe.patience)] if recipe.patience else [])]


SAVE_SECONDS = 900.0
"""The longest time without a checkpoint."""


class SaveRegularly(TrainerCallback):
    """A checkpoint every so many steps and, where steps are slow, after `SAVE_SECONDS`, beside those at evaluations.

    Args:
        every: steps; `None` goes by time alone.
    """

    def __init__(self, every: int | None) -> None:
        self.every, self._saved = every, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time counts from here."""
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save where it is due, in all processes after the same step."""
        late = any_of(time.monotonic() - self._saved >= SAVE_SECONDS)
        if late or (self.every is not None and state.global_step % self.every == 0):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Whatever the checkpoint is for."""
        self._saved = time.monotonic()


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C (SIGINT) and SIGTERM end training after the step at hand, with a checkpoint; a second Ctrl-C at once.

    Attributes:
        by: number of the signal that came; 0 if none did.
    """

    def __init__(self) -> None:
        self.by, self._at = 0, 0.0
        self._old: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen for the signals, where Python allows it: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._told) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if told to, in all processes after the same step."""
        self.by = largest_of(self.by)
        if self.by and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True  # what is due to be scored, is: no resume will

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        self.release()
        self.by *= state.global_step < state.max_steps

    def release(self) -> None:
        """Give the signals back, also after an error."""
        for number, old in self._old.items():
            signal.signal(number, old)
        self._old = {}

    def check(self, step: int) -> None:
        """Raise `Interrupted` if training was stopped, after this step."""
        if self.by:
            raise Interrupted(f"stopped after step {step}; go on with resume (--resume)", self.by)

    def _told(self, number: int, *_: Any) -> None:
        # A launcher passes on what the terminal or the batch system has told each process already: that is no second.
        if self.by and number == signal.SIGINT and time.monotonic() - self._at > 1:
            self.release()
            raise KeyboardInterrupt
        if not self.by:
            self.by, self._at = number, time.monotonic()
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
