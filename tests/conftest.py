"""What every test needs: no network, few threads, and the tiny models of `tiny.py`."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tiny import tiny_backbone, tiny_model
from tiny_hub import Hub
from transformers.utils import logging

from zipper_lm import ZipperModel

__all__ = ["tiny_backbone", "tiny_model"]

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A stand-in for uploads to the Hub, in a folder."""
    return Hub(tmp_path / "hub", monkeypatch)


@pytest.fixture
def model() -> ZipperModel:
    return tiny_model(gate=0.5)
