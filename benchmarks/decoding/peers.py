"""Writers of transformers': the bare backbone, and Mllama's text model, whose cross-attention reads given states."""

from __future__ import annotations

from typing import Any

import torch
from common.turns import device
from decoding.ours import Write
from decoding.sizes import BOS, Size
from transformers import CompileConfig, MllamaForCausalLM, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.models.mllama.configuration_mllama import MllamaTextConfig


def bare(size: Size, batch: int, compiled: bool) -> Write:
    """The text backbone alone, which reads nothing."""
    model = size.text.make(size.dtype)
    return _generate(model, batch, _static(model, size) if compiled else None)


def mllama(size: Size, batch: int, compiled: bool) -> Write:
    """The same decoder with as many layers of cross-attention, each with a feed-forward as wide as the tower's."""
    layers = size.text.layers + size.zips
    crossing = [(k + 1) * (size.every + 1) - 1 for k in range(size.zips)]
    torch.manual_seed(0)
    config = MllamaTextConfig(num_hidden_layers=layers, cross_attention_layers=crossing, **size.text.settings())
    with torch.device(device()):
        model = _Mllama(config)
        for name, parameter in model.named_parameters():
            if "gate" in name:
                torch.nn.init.constant_(parameter, 1.0)
        states = torch.randn(batch, size.memory, size.text.width, dtype=size.dtype)
    model = model.to(size.dtype).eval()
    cache = _static(model, size) if compiled else None
    if cache is not None:
        for layer in crossing:
            cache.layers[layer] = StaticLayer(max_cache_len=size.memory)
    return _generate(model, batch, cache, cross_attention_states=states)


class _Mllama(MllamaForCausalLM):
    """Its cross-attention keeps keys and values once they are there; alone, it would be given the states each time."""

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration:
            inputs["cross_attention_states"] = None
        return inputs


def _static(model: PreTrainedModel, size: Size) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=size.tokens + 1)


def _generate(model: PreTrainedModel, batch: int, cache: StaticCache | None, **given: Any) -> Write:
    """Greedy `generate()`; with a cache of fixed size its step is compiled, on a CPU, too."""
    start = torch.full((batch, 1), BOS, device=device())
    how: dict[str, Any] = {"attention_mask": torch.ones_like(start), "do_sample": False}
    if cache is not None:
        how["past_key_values"] = cache
        how["compile_config"] = CompileConfig()
        how["compile_config"]._compile_all_devices = True

    @torch.no_grad()
    def write(tokens: int) -> list[list[int]]:
        if cache is not None:
            cache.reset()
        exactly = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        return model.generate(start, **how, **exactly, **given)[:, 1:].tolist()  # type: ignore[operator]

    return write
