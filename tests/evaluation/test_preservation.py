"""Verification finds a single changed weight."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_backbone

from zipper_lm import ZipperModel
from zipper_lm.evaluation.preservation import changed_sources, perplexity, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, kind in (("text", "llama"), ("speech", "gpt2-tied")):
        tiny_backbone(kind, 31, 2).save_pretrained(tmp_path / name)
    sources = {n: str(tmp_path / n) for n in ("text", "speech")}
    ZipperModel.fuse(sources, train={"speech": "lora"}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_untouched_towers_are_identical(folder: Path) -> None:
    reports = verify(ZipperModel.from_pretrained(folder), folder)
    assert [(r.name, r.train, r.identical, r.largest) for r in reports] == [
        ("speech", "lora", True, 0.0),
        ("text", "frozen", True, 0.0),
    ]
    assert all(r.tensors == r.equal > 10 for r in reports)


def test_adapters_are_left_out_and_put_back(folder: Path) -> None:
    model = ZipperModel.from_pretrained(folder)
    tower = model.tower("speech")
    with torch.no_grad():
        for name in tower.adapter_names:
            tower.backbone.get_parameter(name).fill_(0.1)
    ids = torch.tensor([[3, 4, 5]])
    before = tower.backbone(input_ids=ids).logits
    assert verify(model, folder)[0].identical
    assert torch.equal(tower.backbone(input_ids=ids).logits, before)
    assert {n for n, p in tower.backbone.named_parameters() if p.requires_grad} == set(tower.adapter_names)


def test_one_changed_number_is_found(folder: Path) -> None:
    model = ZipperModel.from_pretrained(folder)
    with torch.no_grad():
        model.tower("text").backbone.get_input_embeddings().weight[3, 2] += 0.5  # type: ignore[operator]
    report = verify(model, folder)[1]
    assert not report.identical
    assert report.tensors - report.equal == 1
    assert report.largest == pytest.approx(0.5)
    assert report.summary()["identical"] is False


def test_a_changed_source_is_named(folder: Path) -> None:
    assert changed_sources(folder) == {}
    tiny_backbone("llama", 31, 2, seed=1).save_pretrained(folder.parent / "text")
    assert list(changed_sources(folder)) == ["text"]
    with pytest.raises(ValueError, match=r"no config\.json"):
        changed_sources(folder.parent)


def test_perplexity_is_the_plain_backbones(model: ZipperModel) -> None:
    row = [5, 6, 7, 8]
    ids = torch.tensor([[0, *row, 1]])
    with torch.no_grad():
        expected = math.exp(model.tower("text").backbone(input_ids=ids, labels=ids).loss)
    assert perplexity(model, "text", [row]) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, "text", [row, row, [9]], batch_size=2) == pytest.approx(
        perplexity(model, "text", [row, row, [9]], batch_size=3), rel=1e-5
    )


def test_a_trained_tower_without_a_source_is_said_to_have_none(tmp_path: Path) -> None:
    """A tower given as an object and trained has no source; its empty name was looked for on the disk, and verifying
    the others ended in an AttributeError of transformers."""
    towers = {name: tiny_backbone("llama", 31, 2) for name in ("text", "speech")}
    ZipperModel.fuse(towers, train={"speech": "full"}).save_pretrained(tmp_path)
    speech, text = verify(ZipperModel.from_pretrained(tmp_path), tmp_path)
    assert (speech.name, speech.source, speech.tensors, speech.identical) == ("speech", "", 0, False)
    assert (text.name, text.identical) == ("text", True)
