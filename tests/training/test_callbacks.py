"""What training says, and is told, while it runs."""

from __future__ import annotations

import os
import signal

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from zipper_lm.training import callbacks
from zipper_lm.training.callbacks import SaveRegularly, StopOnInterrupt, score_line
from zipper_lm.utils.interruption import Interrupted


def test_a_score_line_has_the_scores_alone() -> None:
    assert score_line({"loss": 1.23456, "gate/a<-b.0": 0.1, "grad_norm": 3.0, "epoch": 1}) == ""
    logs = {"eval_wer/speech->text": 12.54321, "eval_runtime": 3.0, "eval_samples_per_second": 2.0, "epoch": 1}
    assert score_line(logs) == "wer/speech->text 12.54"


def told(callback: TrainerCallback, event: str, step: int, steps: int = 100) -> TrainerControl:
    """What a callback asks for."""
    control = TrainerControl()
    getattr(callback, event)(None, TrainerState(global_step=step, max_steps=steps), control)
    return control


def test_checkpoints_are_written_by_steps_and_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first was written after the last step, unless there were evaluations before: whatever ended a run, all was
    lost."""
    now = 1000.0
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now)
    often, seldom = SaveRegularly(3), SaveRegularly(None)
    told(seldom, "on_train_begin", 0)
    assert [step for step in range(1, 8) if told(often, "on_step_end", step).should_save] == [3, 6]
    assert not told(seldom, "on_step_end", 1).should_save
    now += 899
    assert not told(seldom, "on_step_end", 2).should_save
    now += 2
    assert told(seldom, "on_step_end", 3).should_save
    told(seldom, "on_save", 3)
    assert not told(seldom, "on_step_end", 4).should_save


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_after_the_step(number: int) -> None:
    """SIGTERM, as batch systems send it, ended it at once, without a checkpoint. What a launcher passes on again in the
    same moment is no second Ctrl-C."""
    stop, before = StopOnInterrupt(), signal.getsignal(signal.SIGTERM)
    told(stop, "on_train_begin", 0)
    try:
        assert not told(stop, "on_step_end", 1).should_training_stop
        for again in (number, number, signal.SIGTERM):
            os.kill(os.getpid(), again)
        control = told(stop, "on_step_end", 2)
        assert control.should_training_stop
        assert control.should_save
        stop._at -= 2
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.release()
    told(stop, "on_train_end", 2)
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(Interrupted, match="step 2") as caught:
        stop.check(2)
    assert caught.value.by == number


def test_a_signal_at_the_last_step_stops_nothing() -> None:
    stop = StopOnInterrupt()
    told(stop, "on_train_begin", 0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert not told(stop, "on_step_end", 100).should_training_stop
    told(stop, "on_train_end", 100)
    stop.check(100)
