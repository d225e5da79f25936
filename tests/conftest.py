"""Tiny towers, written by the tests themselves with the same classes that users load."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from zipper_lm import ZipperModel, ZipSpec

logging.set_verbosity_error()
torch.set_num_threads(2)


def tiny_backbone(kind: str, vocab: int, layers: int = 4, seed: int = 0) -> PreTrainedModel:
    """A random decoder of three families, special ids 0 (bos), 1 (eos), 2 (pad)."""
    torch.manual_seed(seed)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.3}
    if kind == "gpt2":
        config = GPT2Config(n_embd=24, n_layer=layers, n_head=2, vocab_size=vocab, n_positions=256, **special)
        return GPT2LMHeadModel(config).eval()
    common = {"intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": vocab}
    if kind == "qwen3":
        config = Qwen3Config(hidden_size=40, num_key_value_heads=2, head_dim=10, **common, **special)
        return Qwen3ForCausalLM(config).eval()
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, num_key_value_heads=2, **common, **special)).eval()


def tiny_model(towers: int = 2, *, gate: float = 0.0, seed: int = 0, **kwargs: object) -> ZipperModel:
    """Two or three towers of different family, width and depth; `gate` other than 0 makes the zips matter."""
    kinds = {"text": ("llama", 31, 4), "speech": ("gpt2", 53, 6), "image": ("qwen3", 41, 3)}
    backbones = {n: tiny_backbone(k, v, d) for n, (k, v, d) in list(kinds.items())[:towers]}
    torch.manual_seed(seed)
    zips = kwargs.pop("zips", ZipSpec(gate_start=gate, layers=3))
    model = ZipperModel.fuse(backbones, zips=zips, **kwargs)  # type: ignore[arg-type]
    if gate:  # residual projections start at zero too: open them
        for projection in model.input_projections.values():
            torch.nn.init.normal_(projection.down.weight, std=0.1)
    return model


@pytest.fixture
def model() -> ZipperModel:
    return tiny_model(gate=0.5)
