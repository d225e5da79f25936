"""What preservation covers for a quantized tower: its quantized tensors, as they were when the zips were made.

Needs ``pip install 'zipper-lm[quantized]'``; left out without it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import open_gates, tiny_backbone

from zipper_lm import Document, Segment, ZipperModel, ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.evaluation.preservation import verify
from zipper_lm.fusion.backbones import load_backbone
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.utils.tensors import stored, weights_hash

WAYS = [
    pytest.param(
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
        id="bitsandbytes-4bit",
    ),
    pytest.param(
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
        id="bitsandbytes-8bit",
    ),
    pytest.param(
        {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
        },
        marks=pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed"),
        id="torchao-int8",
    ),
]


def documents(model: ZipperModel) -> Any:
    rows = [Document([Segment("text", ids=[5, 6, 7]), Segment("speech", ids=[8, 9], target=True)])]
    return collate(rows, model.specials)


@pytest.mark.parametrize("quantization", WAYS)
def test_a_quantized_tower_is_untouched_by_training_and_found_again(
    quantization: dict[str, Any], tmp_path: Path
) -> None:
    tiny_backbone("llama", 64).save_pretrained(tmp_path / "text")
    tiny_backbone("gpt2", 53).save_pretrained(tmp_path / "speech")
    text = TowerSpec(source=str(tmp_path / "text"), quantization=quantization)
    model = ZipperModel.fuse({"text": text, "speech": tmp_path / "speech"}, zips=ZipSpec(layers=2, gate_start=0.5))
    open_gates(model, 0.3)
    before = weights_hash(model.tower("text").backbone)
    bare = model.tower("text")(torch.tensor([[0, 5, 6]]))[0]
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(documents(model)).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert losses[-1] < losses[0]
    assert weights_hash(model.tower("text").backbone) == before
    assert torch.equal(model.tower("text")(torch.tensor([[0, 5, 6]]))[0], bare)
    model.save_pretrained(tmp_path / "model")
    again = ZipperModel.from_pretrained(tmp_path / "model")
    assert all(report.identical for report in verify(again))
    with torch.no_grad():
        assert torch.equal(model(documents(model)).logits["speech"], again(documents(again)).logits["speech"])


@pytest.mark.parametrize("quantization", WAYS)
def test_every_quantized_matrix_is_in_the_hash(quantization: dict[str, Any], tmp_path: Path) -> None:
    """torchao's tensors all have the address 0: of the matrices of one shape only the first was hashed, the others were
    taken for the same memory, and a change in them went unnoticed."""
    tiny_backbone("llama", 64).save_pretrained(tmp_path)
    backbone = load_backbone(TowerSpec(source=str(tmp_path), quantization=quantization))
    before = weights_hash(backbone)
    for layer in backbone.model.layers:
        part = next(p for p in stored(layer.self_attn.v_proj.weight.detach()) if not p.is_floating_point())
        kept = part.clone()
        part.view(-1)[0] ^= 1
        assert weights_hash(backbone) != before
        part.copy_(kept)
    assert weights_hash(backbone) == before


def test_quantized_weights_cannot_be_trained_in_full() -> None:
    with pytest.raises(ValueError, match=r'train="full".*lora'):
        TowerSpec(source="here", train="full", quantization={"quant_method": "bitsandbytes", "load_in_4bit": True})


def test_an_unknown_method_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    tiny_backbone("llama", 64).save_pretrained(tmp_path)
    spec = TowerSpec(source=str(tmp_path), quantization={"quant_method": "no-such"})
    with pytest.raises(ValueError, match=r"tower.quantization.*no-such"):
        ZipperModel.fuse({"text": spec, "speech": tmp_path})
