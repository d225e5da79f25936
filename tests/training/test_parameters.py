"""What training does with a model's parameters."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import tiny_model

from zipper_lm.training.parameters import check_precision
from zipper_lm.utils import products

CPU = torch.device("cpu")


def test_half_precision_that_is_trained_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loaded model may have any dtype: nothing said that bfloat16 weights hardly move."""
    monkeypatch.setattr(products, "is_multiplied_here", lambda dtype: True)
    model = tiny_model()
    model.tower("text").backbone.to(torch.float16)  # frozen
    with caplog.at_level(logging.WARNING):
        check_precision(model, CPU)
    assert not caplog.records
    model.zips.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        check_precision(model, CPU)
    assert "zips." in caplog.text
    assert "bfloat16, in which small updates are lost" in caplog.text
    with pytest.raises(ValueError, match=r"training: \w+ is float16, whose range is too narrow .*float32"):
        check_precision(model.half(), CPU)


def test_what_a_processor_multiplies_slowly_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen LLM came in bfloat16, as it is published, to a processor with AVX2 alone: a step took a minute
    in place of a second, and nothing said why."""
    monkeypatch.setattr(products, "is_multiplied_here", lambda dtype: dtype != torch.bfloat16)
    model = tiny_model()
    with caplog.at_level(logging.WARNING):
        check_precision(model, CPU)
        model.tower("text").backbone.to(torch.bfloat16)  # frozen
        check_precision(model, torch.device("cuda"))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check_precision(model, CPU)
    (record,) = caplog.records
    assert "towers.text." in record.getMessage()
    assert "is bfloat16, which this processor multiplies many times as slowly" in record.getMessage()


def test_so_is_what_autocast_rounds_to(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bfloat16 weights that are trained, advice was to round to bfloat16 in place of that: as slow on such a
    processor. Vectors, such as a quantized tower's norms, are multiplied by no matrix."""
    monkeypatch.setattr(products, "is_multiplied_here", lambda dtype: dtype != torch.bfloat16)
    model = tiny_model()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data.to(torch.bfloat16)
            parameter.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        check_precision(model, CPU, torch.float16)
        check_precision(model, torch.device("cuda"), torch.bfloat16)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check_precision(model, CPU, torch.bfloat16)
    (record,) = caplog.records
    assert record.getMessage().startswith("training.arguments.bf16=true: bfloat16, which this processor multiplies")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check_precision(model.to(torch.bfloat16).requires_grad_(True), CPU)
    lost, slow = (record.getMessage() for record in caplog.records)
    assert "small updates are lost" in lost
    assert "bf16: true" not in lost + slow
