"""What training does with a model's parameters."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import tiny_model

from zipper_lm.training.parameters import check_precision


def test_half_precision_that_is_trained_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A loaded model may have any dtype: nothing said that bfloat16 weights hardly move."""
    model = tiny_model()
    model.tower("text").backbone.to(torch.float16)  # frozen
    with caplog.at_level(logging.WARNING):
        check_precision(model)
    assert not caplog.records
    model.zips.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        check_precision(model)
    assert "zips." in caplog.text
    assert "bfloat16, in which small updates are lost" in caplog.text
    with pytest.raises(ValueError, match=r"training: \w+ is float16, whose range is too narrow .*float32"):
        check_precision(model.half())
