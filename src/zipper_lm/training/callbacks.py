"""How training stops when it is interrupted."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from transformers import TrainerCallback

from zipper_lm.utils.processes import any_of


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
