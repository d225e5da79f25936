"""Fingerprints of backbones."""

import torch
from tiny import tiny_backbone

from zipper_lm import backbones


def test_weights_hash_is_of_names_and_bytes() -> None:
    linear = torch.nn.Linear(3, 2)
    first = backbones.weights_hash(linear)
    assert first == backbones.weights_hash(linear)
    with torch.no_grad():
        linear.weight[0, 0] += 1e-6
    assert backbones.weights_hash(linear) != first
    assert backbones.weights_hash(torch.nn.Sequential(linear)) != backbones.weights_hash(linear)
    assert len(backbones.weights_hash(linear.bfloat16())) == 64


def test_a_tied_tensor_counts_once() -> None:
    backbone = tiny_backbone("gpt2-tied", 53)
    names = set(backbones.without_aliases(backbone.state_dict()))
    assert ("lm_head.weight" in names) != ("transformer.wte.weight" in names)
