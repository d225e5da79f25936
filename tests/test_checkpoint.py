"""What contract 6 (tests/contracts/test_checkpoint_contract.py) does not say: ownership, warnings, adapters."""

import logging
from pathlib import Path

import pytest
from tiny import tiny_backbone, tiny_model

from zipper_lm import ZipperModel, checkpoint


def test_split_is_by_ownership() -> None:
    """A tower called like a child of the model does not confuse it."""
    model = ZipperModel.fuse({"zips": tiny_backbone("llama", 31), "towers": tiny_backbone("gpt2", 53)})
    own = checkpoint.split(model)
    assert not any(k.startswith("towers.") for k in own)
    assert sum(v.numel() for v in own.values()) == model.num_parameters(only_trainable=True)


def test_an_argument_without_effect_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        ZipperModel.from_pretrained(tmp_path / "model", device_map="auto")
    assert "['device_map'] have no effect" in caplog.text


