"""Every block of docs/checkpoints.md is run from recipe to saved model, on a small random stand-in of the same class.

A stand-in is saved with the same peculiarities as the published checkpoint: prefixes, parts of configs, tokens that are
not there, a head that lacks an id. The Hub's ids in the block are replaced by its folder, nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    EncodecConfig,
    EncodecModel,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    HubertConfig,
    HubertModel,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
)

from zipper_lm import Document, ZipperModel
from zipper_lm.codecs.text import TextCodec
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.reader import build
from zipper_lm.jobs.recipes.schema import FuseRecipe

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
BLOCKS = re.findall(r"```yaml tower checkpoint\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
SIZE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WORDS = ["one two", "two one two", "one"]
PROTEINS = ["MKVLA", "MAAK", "MLV"]


def with_tokenizer(
    model: PreTrainedModel, folder: Path, texts: list[str], *, bos: bool = True, lower: bool = True
) -> None:
    tokenizer = TextCodec.train(texts, vocab_size=40, lower=lower).tokenizer
    if not bos:
        tokenizer.bos_token = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def text(config: Any, owner: Any, **more: Any) -> Callable[[Path], None]:
    return lambda folder: with_tokenizer(owner(config(**SIZE, vocab_size=40, pad_token_id=0)), folder, WORDS, **more)


def gemma(folder: Path) -> None:
    inner = Gemma3TextConfig(**SIZE, head_dim=8, vocab_size=64)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision |= {"image_size": 28, "patch_size": 14}
    whole = Gemma3Config(text_config=inner.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    with_tokenizer(Gemma3ForConditionalGeneration(whole), folder, WORDS)


def slam(folder: Path) -> None:
    Qwen2ForCausalLM(Qwen2Config(**SIZE, vocab_size=502)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    whole = {"model_type": "speech_language_model", "architectures": ["UnitLM"], "base_config": config}
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"lm.{k}": v for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def twist(folder: Path) -> None:
    size = {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    OPTForCausalLM(OPTConfig(**size, vocab_size=503, offset=3)).save_pretrained(folder)


def hubert(folder: Path) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 11, "num_attention_heads": 2, "intermediate_size": 16}
    HubertModel(
        HubertConfig(**size, conv_dim=[8] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    ).save_pretrained(folder)
    np.save(folder / "km500.npy", np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32))


def encodec_config() -> EncodecConfig:
    size = {"num_filters": 4, "hidden_size": 8, "codebook_size": 2048, "codebook_dim": 8, "num_lstm_layers": 1}
    return EncodecConfig(**size, sampling_rate=32_000, upsampling_ratios=[8, 5, 4, 4], target_bandwidths=[2.2])


def musicgen(folder: Path) -> None:
    size = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "ffn_dim": 24, "vocab_size": 2048}
    decoder = MusicgenDecoderConfig(**size, num_codebooks=4, pad_token_id=2048, bos_token_id=2048)
    reader = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=11)
    parts = {
        "text_encoder": reader.to_dict(),
        "audio_encoder": encodec_config().to_dict(),
        "decoder": decoder.to_dict(),
    }
    MusicgenForConditionalGeneration(MusicgenConfig(**parts)).save_pretrained(folder)


def imagegpt(folder: Path) -> None:
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 513}
    ImageGPTForCausalImageModeling(ImageGPTConfig(**size)).save_pretrained(folder)
    clusters = np.random.default_rng(0).uniform(-1, 1, (512, 3))
    ImageGPTImageProcessor(clusters=clusters.tolist(), size={"height": 4, "width": 4}).save_pretrained(folder)


STAND_INS: dict[str, Callable[[Path], None]] = {
    "HuggingFaceTB/SmolLM2-135M": text(LlamaConfig, LlamaForCausalLM),
    "HuggingFaceTB/SmolLM3-3B": text(SmolLM3Config, SmolLM3ForCausalLM, bos=False),
    "Qwen/Qwen3-0.6B": text(Qwen3Config, Qwen3ForCausalLM, bos=False),
    "meta-llama/Llama-3.2-1B": text(LlamaConfig, LlamaForCausalLM),
    "google/gemma-3-1b-pt": text(Gemma3TextConfig, Gemma3ForCausalLM),
    "google/gemma-3-4b-pt": gemma,
    "slprl/slam": slam,
    "TWIST-350M": twist,
    "slprl/mhubert-base-25hz": hubert,
    "facebook/musicgen-small": musicgen,
    "facebook/encodec_32khz": lambda folder: EncodecModel(encodec_config()).save_pretrained(folder),
    "openai/imagegpt-small": imagegpt,
    "nferruz/ProtGPT2": lambda folder: with_tokenizer(
        GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40)), folder, PROTEINS, lower=False
    ),
}


def with_stand_ins(part: Any, folder: Path) -> Any:
    """The recipe's part with the folder of a stand-in in place of each id."""
    if isinstance(part, dict):
        return {k: with_stand_ins(v, folder) for k, v in part.items()}
    if part not in STAND_INS:
        return part
    place = folder / part.replace("/", "--")
    if not place.is_dir():
        torch.manual_seed(0)
        place.mkdir(parents=True)
        STAND_INS[part](place)
    return str(place)


def value(modality: str, number: int, folder: Path) -> str:
    """A raw value as a JSONL row names it."""
    draw = np.random.default_rng(number)
    if modality == "image":
        Image.fromarray(draw.integers(0, 255, (6, 6, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        return f"{number}.png"
    if modality in ("speech", "music"):
        soundfile.write(folder / f"{number}.wav", draw.uniform(-0.3, 0.3, 3200 + 800 * number), 16_000)
        return f"{number}.wav"
    return {"protein": PROTEINS, "text": WORDS}[modality][number]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: re.search(r"(?:source|text|protein): (\S+)", b)[1])  # type: ignore[index]
def test_a_published_checkpoint_is_a_tower(block: str, tmp_path: Path) -> None:
    towers = with_stand_ins(yaml.safe_load(block)["towers"], tmp_path / "hub")
    (modality,) = towers
    with_tokenizer(LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=40)), tmp_path / "partner", WORDS)
    (tmp_path / "data").mkdir()
    rows = [{"partner": WORDS[n], modality: value(modality, n, tmp_path / "data")} for n in range(3)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    made = {
        "towers": {**towers, "partner": str(tmp_path / "partner")},
        "zips": [{"layers": 2}],
        "data": {"source": str(tmp_path / "data"), "columns": {n: n for n in rows[0]}, "validation": None},
        "tasks": {f"partner->{modality}": 1, f"{modality}->partner": 1},
        "training": {"steps": 2, "batch_size": 3, "log_every": 1},
        "output": str(tmp_path / "model"),
    }
    record = fuse(build(FuseRecipe, made))
    assert np.isfinite(record["train_loss"])
    assert all(record["frozen_unchanged"].values())
    model = ZipperModel.from_pretrained(tmp_path / "model")
    given = [Document([("partner", "one")])]
    said = model.generate(given, [modality, "partner"], settings={n: {"max_new_tokens": 16} for n in rows[0]})[0]
    content = set(range(model.tower(modality).vocab_size)) - set(model.specials[modality])
    assert set(said[1].ids or []) <= content
    assert said[2].modality == "partner"
    assert (said[1].value is None) == (modality == "speech")  # no vocoder is named: units are what there is


def test_the_page_and_the_stand_ins_are_of_the_same_checkpoints() -> None:
    named = {word for block in BLOCKS for word in re.findall(r"[\w.-]+/[\w.-]+|TWIST-350M", block)}
    assert named == set(STAND_INS)
