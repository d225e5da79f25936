"""Documents of several turns over three towers train in a padded batch as each does alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tiny import tiny_backbone, tiny_model
from tiny_recipes import say, workshop

from zipper_lm import Document, Segment, ZipperModel
from zipper_lm.codecs.pixels import PixelCodec, PixelCodecConfig
from zipper_lm.data.collation import IGNORED, collate
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.reader import build
from zipper_lm.jobs.recipes.schema import FuseRecipe

TURNS = [
    [("text", [5, 6, 7], False), ("image", [8, 9], True), ("text", [4], True), ("speech", [5, 6, 7, 8, 9, 10], True)],
    [("speech", [12, 13, 14, 15], False), ("text", [9], True), ("speech", [7, 7], True), ("text", [3, 4, 5], True)],
    [("image", [3], False), ("text", [11, 12, 13, 14, 15], True)],
    [("text", [20], False), ("speech", [20, 21], True), ("image", [22, 23, 24], True), ("image", [25], True)],
]


def documents() -> list[Document]:
    return [Document([Segment(name, ids=ids, target=target) for name, ids, target in turns]) for turns in TURNS]


def counts(model: ZipperModel, some: list[Document], side: str) -> dict[str, int]:
    return {n: int((s["labels"] != IGNORED).sum()) for n, s in collate(some, model.specials, side=side).items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_the_losses_and_gradients_of_its_documents(side: str) -> None:
    model = tiny_model(3, gate=1.0, handover_weight=0.0, train=dict.fromkeys(("text", "speech", "image"), "full"))
    together = model(collate(documents(), model.specials, side=side))  # type: ignore[arg-type]
    together.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = counts(model, documents(), side)
    summed = dict.fromkeys(total, 0.0)
    for document in documents():
        alone, own = model(collate([document], model.specials)), counts(model, [document], side)
        sum(loss * own[n] / total[n] for n, loss in alone.losses.items()).backward()
        for name, loss in alone.losses.items():
            summed[name] += float(loss.detach()) * own[name] / total[name]
    for name, loss in together.losses.items():
        assert float(loss.detach()) == pytest.approx(summed[name], rel=1e-5)
    assert len(gradients) > 100
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5), name


def test_a_recipe_of_documents_of_several_turns(tmp_path: Path) -> None:
    """Sound, text and picture in turns: read from JSONL, encoded, trained on, saved, and gone on with."""
    codec = PixelCodec(PixelCodecConfig(height=2, width=2, levels=4))
    codec.save_pretrained(tmp_path / "image")
    tiny_backbone("llama", codec.vocab_size, 2).save_pretrained(tmp_path / "image")
    (tmp_path / "data").mkdir()
    soundfile.write(tmp_path / "data" / "one.wav", say("one"), 16_000)
    Image.fromarray(np.eye(2, dtype=np.uint8) * 255).save(tmp_path / "data" / "one.png")
    turns = [("speech", "one.wav"), ("text", "one"), ("image", "one.png"), ("text", "six"), ("speech", "one.wav")]
    segments = [{"modality": m, "value": v, "target": n % 2 == 1} for n, (m, v) in enumerate(turns)]
    for split in ("train", "validation"):
        lines = [json.dumps({"segments": segments[:end]}) for end in (2, 4, 5)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    made = {
        "towers": {
            "text": {"source": str(workshop() / "text")},
            "speech": {"source": str(workshop() / "speech"), "train": "full"},
            "image": {"source": str(tmp_path / "image"), "train": "full"},
        },
        "data": str(tmp_path / "data"),
        "tasks": {"speech->text": 1},
        "training": {"steps": 3, "batch_size": 3, "log_every": 1},
        "output": str(tmp_path / "model"),
    }
    record = fuse(build(FuseRecipe, made))
    assert record["frozen_unchanged"] == {"text": True}
    assert np.isfinite(record["train_loss"])
    model = ZipperModel.from_pretrained(tmp_path / "model")
    settings = {
        "image": {"max_new_tokens": 4, "min_new_tokens": 4},
        "text": {"max_new_tokens": 3},
        "speech": {"max_new_tokens": 5},
    }
    asked = [Document([("speech", say("one"))]), Document([("text", "one"), ("image", tmp_path / "data" / "one.png")])]
    said = model.generate(asked, ["text", "image", "text", "speech"], settings=settings)
    assert [[s.modality for s in d] for d in said] == [
        ["speech", "text", "image", "text", "speech"],
        ["text", "image", "text", "image", "text", "speech"],
    ]
    assert said[1][3].value.size == (2, 2)
