"""Checkpoints: one file of JSON in a saved model is changed, and the model is loaded."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch
from fuzz.target import Target
from fuzz.targets.folders import changes, link, replace
from safetensors.torch import load_file, save_file
from tiny import open_gates
from tiny_served import codecs
from transformers import LlamaConfig, LlamaForCausalLM

from zipper_lm import ZipperModel, ZipSpec
from zipper_lm.models.records import read_results

NAMES = (
    *("config.json", "config.json", "config.json", "processor_config.json", "generation.json", "results.json"),
    *("towers/text/config.json", "towers/text/generation_config.json", "codecs/speech/codec.json"),
    *("towers/text/model.safetensors.index.json", "codecs/text/tokenizer_config.json"),
)
WORDS = (
    *(
        "gpt2",
        "mamba",
        "mixtral",
        "qwen3",
        "llava",
        "bert",
        "t5",
        "zipper",
        "LlamaForCausalLM",
        "pipeline",
        "AutoModel",
    ),
    *(
        "towers/text",
        "towers/../towers/text",
        "../towers/text",
        "codecs",
        "model.layers",
        "model.embed_tokens",
        "full",
        "lora",
    ),
    *("frozen", "auto_map", "quantization_config", "trust_remote_code", "bitsandbytes", "num_experts", "rope_scaling"),
    *(
        "yarn",
        "linear",
        "dynamic",
        "attn_implementation",
        "kernels/x",
        "tie_word_embeddings",
        "layer_types",
        "first_zip",
    ),
    {"rope_type": "yarn", "factor": 1e9},
    {"r": 10**9, "target_modules": "all-linear"},
    {"r": 4, "target_modules": ".*" * 30},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
)


def make() -> Target:
    """Of a model of three towers: one frozen and stored beside it, one under LoRA, one trained."""
    return Target(name="checkpoints", run=run, share=10, inputs=changes(saved(), NAMES, WORDS))


def run(data: bytes, folder: Path) -> None:
    """Loaded as anybody's."""
    link(saved(), folder)
    replace(folder, data)
    read_results(folder)
    ZipperModel.from_pretrained(folder)


@functools.cache
def saved() -> Path:
    """The model, without the fingerprint that would tell every change of its config at once."""
    folder = Path(tempfile.mkdtemp(prefix="zipper-fuzz-model-"))
    towers = {}
    for name, codec in codecs().items():
        torch.manual_seed(0)
        special = {f"{k}_token_id": getattr(codec, f"{k}_id") for k in ("bos", "eos", "pad")}
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        towers[name] = LlamaForCausalLM(LlamaConfig(vocab_size=codec.vocab_size, **shape, **special)).eval()
    train = {"text": "frozen", "speech": "lora", "image": "full"}
    model = ZipperModel.fuse(towers, codecs=codecs(), zips=ZipSpec(layers=1, heads=2), train=train)
    open_gates(model, 0.5)
    model.generation_settings = {"text": {"max_new_tokens": 4, "do_sample": True, "temperature": 0.7}}
    model.save_pretrained(folder, card=False)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file)
    (folder / "results.json").write_text('[{"task": "asr", "wer": 1.5, "limit": null}]')
    parts = dict.fromkeys(load_file(folder / "towers/text/model.safetensors"), "model.safetensors")
    index = {"metadata": {"total_size": 100}, "weight_map": parts}
    (folder / "towers/text/model.safetensors.index.json").write_text(json.dumps(index))
    return folder
