"""Attention maps are what the zips use."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import doc

from zipper_lm import ZipperModel
from zipper_lm.data.collation import Batch, collate
from zipper_lm.evaluation.attention import attention_maps, observe


def test_maps_are_probabilities_over_what_is_visible(model: ZipperModel) -> None:
    batch = collate([doc(("speech", [5, 6, 7]), ("text", [3, 4]))], model.specials)
    model.train()
    maps = attention_maps(model, batch)
    assert model.training
    text = {k: v for k, v in maps.items() if k.startswith("text<-speech")}
    assert len(text) == 3
    for weights in text.values():
        assert weights.shape[2:] == (4, 5)  # BOS ids EOS of either
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    for name, weights in maps.items():
        if name.startswith("speech<-text"):
            assert not weights.any()  # speech comes first and sees nothing


def entropies(model: ZipperModel, batch: Batch) -> dict[str, float]:
    return {n: g.entropy for n, g in observe(model, batch).items() if g.entropy is not None}


def test_entropy_of_attention_that_cannot_choose_is_one(model: ZipperModel) -> None:
    batch = collate([doc(("speech", [5, 6, 7]), ("text", [3, 4])), doc(("text", [3]))], model.specials)
    shares = entropies(model, batch)
    assert set(shares) == {f"text<-speech.{k}" for k in range(3)}
    assert all(0 <= share <= 1.0001 for share in shares.values())
    with torch.no_grad():
        for k in range(3):
            model.zip_layer("text", "speech", k).q_proj.weight.zero_()
    assert all(math.isclose(s, 1, abs_tol=1e-4) for s in entropies(model, batch).values())


def test_maps_are_computed_as_the_zip_does(model: ZipperModel) -> None:
    batch = collate([doc(("speech", [5, 6, 7]), ("text", [3, 4]))], model.specials)
    layer = model.zip_layer("text", "speech", 0)
    seen = {}
    handle = layer.register_forward_hook(lambda m, args, output: seen.update(args=args, output=output))
    maps = attention_maps(model, batch)
    handle.remove()
    _, _, memory, _ = seen["args"]
    attended = (maps["text<-speech.0"] @ memory.values).transpose(1, 2).flatten(2)
    with torch.no_grad():
        update = layer.gate(layer.o_proj(attended))
    assert torch.allclose(update, seen["output"], atol=1e-5)
    assert update.abs().max() == pytest.approx(float(seen["output"].abs().max()), rel=1e-3)
