"""Contract 2: training leaves every frozen backbone bit-identical to the checkpoint it was loaded from."""

from pathlib import Path

import pytest
import torch
from tiny import doc, open_gates, tiny_backbone
from transformers import AutoModelForCausalLM

from zipper_lm import TowerSpec, ZipperModel, ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.evaluation.preservation import verify

DOCUMENTS = [
    doc(("speech", [5, 6, 7, 8]), ("text", [4, 9, 3]), target=True),
    doc(("text", [4, 9]), ("speech", [9, 8, 7, 6]), target=True),
]


def train(model: ZipperModel, steps: int = 3) -> None:
    open_gates(model, 0.3)
    batch = collate(DOCUMENTS, model.specials)
    # As Trainer does with weight decay: every parameter that asks for gradients, and decay would move the others.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize(
    "choice", [{}, {"speech": "full"}, {"text": "lora"}, {"text": "lora", "speech": "full"}], ids=str
)
def test_bit_identical(choice: dict[str, str], tmp_path: Path) -> None:
    sources = {"text": ("llama", 31), "speech": ("gpt2-tied", 53)}
    for name, (kind, vocab) in sources.items():
        tiny_backbone(kind, vocab).save_pretrained(tmp_path / name)
    model = ZipperModel.fuse({n: tmp_path / n for n in sources}, zips=ZipSpec(layers=2), train=choice)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("zips.") for n in moved)
    ids = torch.tensor([[0, 4, 9, 3, 1]])
    for name in sources:
        source = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        backbone = model.tower(name).backbone
        state = {k.replace(".base_layer.", "."): v for k, v in backbone.state_dict().items()}
        same = {k: torch.equal(v, state[k]) for k, v in source.state_dict().items()}
        if choice.get(name) == "full":
            assert not all(same.values())
            continue
        assert all(same.values()), [k for k, equal in same.items() if not equal]
        logits = backbone(input_ids=ids).logits
        assert torch.equal(logits, source(input_ids=ids).logits) == (choice.get(name) != "lora")


def test_frozen_towers_do_not_drop_out(tmp_path: Path) -> None:
    """GPT-2 has dropout in its config; a frozen tower must not use it, checkpointed or not."""
    torch.manual_seed(0)
    backbones = {"text": tiny_backbone("llama", 31), "speech": tiny_backbone("gpt2", 53)}
    model = ZipperModel.fuse(backbones, zips=ZipSpec(layers=2, gate_start=0.3))
    batch = collate(DOCUMENTS, model.specials)
    still = model(batch).loss
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        assert torch.equal(model(batch).loss, still)
        model.eval()


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_however_adapters_start_the_base_is_the_source(start: bool | str, tmp_path: Path) -> None:
    for name in ("text", "speech"):
        tiny_backbone("llama", 31).save_pretrained(tmp_path / name)
    spec = TowerSpec(source=str(tmp_path / "text"), train="lora", lora={"init_lora_weights": start})
    model = ZipperModel.fuse({"text": spec, "speech": tmp_path / "speech"}, zips=ZipSpec(layers=2))
    train(model)
    model.save_pretrained(tmp_path / "model")
    again = ZipperModel.from_pretrained(tmp_path / "model")
    assert [r.identical for r in verify(again, tmp_path / "model")] == [True, True]
    batch = collate(DOCUMENTS, model.specials)
    assert torch.equal(again(batch).logits["text"], model(batch).logits["text"])
