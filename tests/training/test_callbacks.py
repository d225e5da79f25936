"""What training says while it runs."""

from __future__ import annotations

from zipper_lm.training.callbacks import score_line


def test_a_score_line_has_the_scores_alone() -> None:
    assert score_line({"loss": 1.23456, "gate/a<-b.0": 0.1, "grad_norm": 3.0, "epoch": 1}) == ""
    logs = {"eval_wer/speech->text": 12.54321, "eval_runtime": 3.0, "eval_samples_per_second": 2.0, "epoch": 1}
    assert score_line(logs) == "wer/speech->text 12.54"
