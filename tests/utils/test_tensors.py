"""Which tensors are the same."""

from __future__ import annotations

import torch
from tiny import tiny_backbone

from zipper_lm.utils.tensors import weights_hash, without_aliases


def test_weights_hash_is_of_names_and_bytes() -> None:
    linear = torch.nn.Linear(3, 2)
    first = weights_hash(linear)
    assert first == weights_hash(linear)
    with torch.no_grad():
        linear.weight[0, 0] += 1e-6
    assert weights_hash(linear) != first
    assert weights_hash(torch.nn.Sequential(linear)) != weights_hash(linear)
    assert len(weights_hash(linear.bfloat16())) == 64


def test_a_tied_tensor_counts_once() -> None:
    backbone = tiny_backbone("gpt2-tied", 53)
    names = set(without_aliases(backbone.state_dict()))
    assert ("lm_head.weight" in names) != ("transformer.wte.weight" in names)
