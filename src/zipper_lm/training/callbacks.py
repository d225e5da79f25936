"""What training says while it runs, and how it stops when it is interrupted."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from zipper_lm.training.processes import any_of


class Interrupted(KeyboardInterrupt):
    """Training was stopped by the user after a checkpoint was written."""


class TidyProgress(ProgressCallback):
    """Trainer's progress bar (throughput, time left), with one readable line per log instead of a dict."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the line above the bar, on standard error."""
        if state.is_world_process_zero and self.training_bar is not None and (line := log_line(logs or {})):
            self.training_bar.write(f"step {state.global_step}: {line}", file=sys.stderr)


def log_line(logs: dict[str, Any]) -> str:
    """Losses, learning rate and scores of one log; gates and bookkeeping go to TensorBoard alone."""
    shown = {k: v for k, v in logs.items() if k.startswith(("loss", "eval_")) or k == "learning_rate"}
    return ", ".join(f"{k.removeprefix('eval_').replace('_', ' ')} {float(v):.4g}" for k, v in shown.items())


def tell_tidily(trainer: Trainer) -> None:
    """Exchange Trainer's own way of printing logs for `TidyProgress`; without progress bars nothing is printed."""
    bars = not trainer.args.disable_tqdm
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    if bars:
        trainer.add_callback(TidyProgress())


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
