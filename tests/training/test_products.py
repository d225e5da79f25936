"""Products of a training step: by oneDNN where that is exact, and the process's own setting afterwards."""

from __future__ import annotations

import pytest
import torch
from tiny import doc, open_gates, tiny_model
from torch.backends import mkldnn

from zipper_lm.data.collation import collate
from zipper_lm.training import products
from zipper_lm.training.products import MOST_SCORES, quick_products, scores_of


@pytest.fixture
def slow_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where MKL is slow, whatever this one is."""
    monkeypatch.setattr(products, "is_quicker", lambda: True)


def seen(scores: int) -> tuple[str, bool]:
    """What is set inside: how float32 is multiplied, and whether attention may be fused."""
    with quick_products(scores):
        return mkldnn.matmul.fp32_precision, torch.backends.cuda.flash_sdp_enabled()


def test_inside_products_are_onednns_and_afterwards_all_is_as_before(slow_mkl: None) -> None:
    before = mkldnn.matmul.fp32_precision, torch.backends.cuda.flash_sdp_enabled()
    assert seen(0) == ("bf16", False)
    with pytest.raises(KeyError), quick_products(0):
        raise KeyError
    assert (mkldnn.matmul.fp32_precision, torch.backends.cuda.flash_sdp_enabled()) == before


def test_too_many_scores_are_the_fused_attentions(slow_mkl: None) -> None:
    assert seen(MOST_SCORES + 1) == (mkldnn.matmul.fp32_precision, True)


def test_what_a_caller_set_is_left_alone(slow_mkl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = mkldnn.matmul.fp32_precision
    mkldnn.matmul.fp32_precision = "tf32"
    try:
        assert seen(0) == ("tf32", True)
    finally:
        mkldnn.matmul.fp32_precision = before


def test_a_step_is_the_same_up_to_rounding(slow_mkl: None) -> None:
    model = tiny_model()
    open_gates(model, 0.5)
    batch = collate([doc(("speech", [5, 6, 7, 8]), ("text", [4, 5, 6]), target=True)] * 3, model.specials)
    found = []
    for scores in (MOST_SCORES + 1, 0):
        model.zero_grad()
        with quick_products(scores):
            loss = model(batch).loss
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for plain, quick in zip(*found, strict=True):
        torch.testing.assert_close(quick, plain, rtol=1e-4, atol=1e-5)


def test_scores_are_those_of_every_map() -> None:
    """Whoever is not in the batch has none; one decoder reads all streams one behind the other."""
    model, long, short = tiny_model(), torch.zeros(3, 7), torch.zeros(3, 5)
    sizes = {n: model.tower(n).backbone.config for n in model.names}
    maps = {name: config.num_hidden_layers * config.num_attention_heads for name, config in sizes.items()}
    zips = sum(model.zip_layer(*pair, k).heads for pair, found in model.layer_pairs.items() for k in range(len(found)))
    both = scores_of(model, {"text": short, "speech": long})
    assert both == 3 * (25 * maps["text"] + 49 * maps["speech"] + 35 * zips)
    assert scores_of(model, {"text": short}) == 3 * 25 * maps["text"]
    assert scores_of(model.tower("text").backbone, {"text": short, "speech": long}) == 3 * 144 * maps["text"]
    assert scores_of(model, {}) == 0
