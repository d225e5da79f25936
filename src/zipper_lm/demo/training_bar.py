"""The Trainer's steps on the demo's bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from zipper_lm.bars import bar


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
