"""What contract 6 (tests/contracts/test_checkpoint_contract.py) does not say: fingerprints, codecs, warnings."""

import logging
from pathlib import Path

import pytest
import torch
from tiny import tiny_backbone, tiny_model

from zipper_lm import ZipperModel, checkpoint


def test_weights_hash_is_of_names_and_bytes() -> None:
    linear = torch.nn.Linear(3, 2)
    first = checkpoint.weights_hash(linear)
    assert first == checkpoint.weights_hash(linear)
    with torch.no_grad():
        linear.weight[0, 0] += 1e-6
    assert checkpoint.weights_hash(linear) != first
    assert checkpoint.weights_hash(torch.nn.Sequential(linear)) != checkpoint.weights_hash(linear)
    assert len(checkpoint.weights_hash(linear.bfloat16())) == 64


def test_a_tied_tensor_counts_once() -> None:
    backbone = tiny_backbone("gpt2-tied", 53)
    names = set(checkpoint._without_aliases(backbone.state_dict()))
    assert ("lm_head.weight" in names) != ("transformer.wte.weight" in names)


def test_split_is_by_ownership() -> None:
    """A tower called like a child of the model does not confuse it."""
    model = ZipperModel.fuse({"zips": tiny_backbone("llama", 31), "towers": tiny_backbone("gpt2", 53)})
    own = checkpoint.split(model)
    assert not any(k.startswith("towers.") for k in own)
    assert sum(v.numel() for v in own.values()) == model.num_parameters(only_trainable=True)


def test_no_tokenizer_no_codec(tmp_path: Path) -> None:
    """transformers makes an empty tokenizer up for a folder without one."""
    for name, kind, vocab in (("text", "gpt2", 31), ("speech", "llama", 53)):
        tiny_backbone(kind, vocab).save_pretrained(tmp_path / name)
    model = ZipperModel.fuse({"text": tmp_path / "text", "speech": tmp_path / "speech"})
    assert model.processor is not None
    assert model.processor.codecs == {}
    assert model.specials["text"] == (0, 1, 2)


def test_an_argument_without_effect_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        ZipperModel.from_pretrained(tmp_path / "model", device_map="auto")
    assert "['device_map'] have no effect" in caplog.text


def test_adapters_over_a_tower_without_source(tmp_path: Path) -> None:
    model = tiny_model(train={"text": "lora"})
    with pytest.raises(ValueError, match="'text' has adapters"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_processor_of() -> None:
    model = tiny_model()
    assert checkpoint.processor_of(model) is model.processor
    model.processor = None
    with pytest.raises(ValueError, match="no processor"):
        checkpoint.processor_of(model)
