"""A model without values runs forward and backward, and does what it does with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import doc, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zipper_lm import ZipperModel
from zipper_lm.data.collation import collate
from zipper_lm.utils.shapes import has_values, without_values


def flops(model: ZipperModel) -> int:
    """Of a step on documents of unlike length, by torch's own counter."""
    documents = [
        doc(("text", [*range(3, 14)]), ("speech", [*range(3, 25)]), target=True),
        doc(("speech", [*range(3, 10)]), ("text", [*range(3, 8)]), target=True),
    ]
    batch = collate(documents, model.specials)
    # By plain products of matrices: torch's counter knows no formula for the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model.train()(batch, return_logits=False).loss
        assert loss is not None
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("kind", "train"), [("llama", "lora"), ("gpt2", "full"), ("gemma2", "frozen"), ("lfm2", "lora"), ("mamba", "full")]
)
def test_a_step(kind: str, train: str) -> None:
    chosen: Any = {"kinds": {"text": kind}, "train": {"text": train}}
    model = tiny_model(**chosen)
    with without_values():
        alike = ZipperModel(model.config)
    assert not any(has_values(tensor) for tensor in [*alike.parameters(), *alike.buffers()])
    assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in alike.named_parameters()] == [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert flops(alike) == flops(model)
    trained = [p for p in alike.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


def test_meta_has_none() -> None:
    assert has_values(torch.zeros(1))
    assert not has_values(torch.zeros(1, device="meta"))
    with without_values():
        pass
    assert has_values(torch.nn.Linear(1, 1).weight), "what is made later has values again"
