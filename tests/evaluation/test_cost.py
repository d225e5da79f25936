"""Costs are counted from the matrices that really run."""

from __future__ import annotations

import pytest
import torch
from tiny import doc, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zipper_lm import ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.evaluation.cost import token_cost, zip_cost
from zipper_lm.fusion.zips import View


def test_backbone_matches_a_flop_counter() -> None:
    model = tiny_model()
    cost = token_cost(model, "text")
    batch = collate([doc(("text", list(range(3, 23))))], model.specials)["text"]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.tower("text")(batch["input_ids"], batch["attention_mask"])
    tokens = batch["input_ids"].numel()
    attention = cost.per_past * tokens * tokens  # the counter counts the whole square
    assert counter.get_total_flops() == pytest.approx(2 * (cost.backbone * tokens + attention), rel=0.02)


@pytest.mark.parametrize("feed_forward", [False, True])
def test_zip_matches_a_flop_counter(feed_forward: bool) -> None:
    model = tiny_model(zips=ZipSpec(layers=2, feed_forward=feed_forward))
    layer = model.zip_layer("text", "speech", 0)
    cost = zip_cost([layer])
    states, hidden = torch.randn(1, 7, model.tower("speech").hidden_size), torch.randn(1, 3, 32)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels are not counted on CPU
        with FlopCounterMode(display=False) as remembering:
            memory = layer.remember(states, torch.arange(7)[None])
        with FlopCounterMode(display=False) as reading:
            layer(hidden, torch.arange(3)[None], memory, View.of(torch.ones(1, 3, 7, dtype=torch.bool)))
    assert remembering.get_total_flops() == 2 * 7 * cost.remember
    assert reading.get_total_flops() == 2 * 3 * (cost.step + 7 * cost.per_memory)


def test_costs_add_up() -> None:
    model = tiny_model(3)
    cost = token_cost(model, "text")
    assert set(cost.zips) == {"speech", "image"}
    assert cost.of_zips(10) - cost.of_zips(0) == 10 * sum(z.per_memory for z in cost.zips.values())
    assert cost.of_backbone(5) == cost.backbone + 5 * cost.per_past
    with pytest.raises(ValueError, match="unknown tower"):
        token_cost(model, "smell")
