"""Tiny towers and models, written by the tests themselves with the same classes that users load."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from zipper_lm import Document, Segment, ZipperModel, ZipSpec
from zipper_lm.data.collation import TowerBatch, collate
from zipper_lm.data.document import Document as _Document

Texts = Sequence[tuple[str, list[int]]]


def tiny_backbone(kind: str, vocab: int, layers: int = 4, seed: int = 0) -> PreTrainedModel:
    """A random decoder, special ids 0 (bos), 1 (eos), 2 (pad), weights large enough for clear argmaxes."""
    torch.manual_seed(seed)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.3}
    depth = {"num_hidden_layers": layers, "vocab_size": vocab}
    attention = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    if kind.startswith("gpt2"):
        gpt2 = {"n_embd": 24, "n_layer": layers, "n_head": 2, "vocab_size": vocab, "n_positions": 256}
        gpt2["tie_word_embeddings"] = kind == "gpt2-tied"
        return GPT2LMHeadModel(GPT2Config(**gpt2, **special)).eval()
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(hidden_size=40, head_dim=10, **attention, **depth, **special)).eval()
    if kind == "gemma2":  # every other layer with a window smaller than the streams
        window = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
        return Gemma2ForCausalLM(Gemma2Config(hidden_size=32, **window, **attention, **depth, **special)).eval()
    if kind == "mistral":  # a window smaller than the streams
        return MistralForCausalLM(
            MistralConfig(hidden_size=32, sliding_window=4, **attention, **depth, **special)
        ).eval()
    if kind == "mamba":  # recurrent
        return MambaForCausalLM(MambaConfig(hidden_size=16, state_size=4, **depth, **special)).eval()
    if kind == "lfm2":  # hybrid: short convolutions and attention
        types = ["conv", "full_attention"] * (layers // 2)
        return Lfm2ForCausalLM(Lfm2Config(hidden_size=32, layer_types=types, **attention, **depth, **special)).eval()
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, **attention, **depth, **special)).eval()


KINDS = {"text": ("llama", 31, 4), "speech": ("gpt2", 53, 6), "image": ("qwen3", 41, 3)}


def tiny_model(
    towers: int = 2, *, gate: float = 0.0, seed: int = 0, kinds: dict[str, str] | None = None, **kwargs: object
) -> ZipperModel:
    """Two or three towers of different family, width and depth; `gate` other than 0 makes the zips matter."""
    chosen = dict(list(KINDS.items())[:towers])
    backbones = {n: tiny_backbone((kinds or {}).get(n, k), v, d) for n, (k, v, d) in chosen.items()}
    torch.manual_seed(seed)
    zips = kwargs.pop("zips", ZipSpec(gate_start=gate, layers=3))
    model = ZipperModel.fuse(backbones, zips=zips, **kwargs)  # type: ignore[arg-type]
    if gate:
        open_gates(model, gate)
    return model


@torch.no_grad()
def open_gates(model: ZipperModel, gate: float) -> None:
    """Make every new module matter: gates, and what else starts at zero. From 0.5 on they matter as much as the towers
    do, and attention is sharp: else a wrong view or place would often leave the greedy tokens as they are."""
    for name, parameter in [*model.zips.named_parameters(), *model.input_projections.named_parameters()]:
        silent = name.endswith("weight") and not parameter.any()
        if "gate" in name:
            parameter.fill_(gate)
        elif gate >= 0.5 and name.endswith((".q_proj.weight", ".k_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.4)
        elif gate >= 0.5 and name.endswith(".o_proj.weight"):
            torch.nn.init.normal_(parameter, std=0.6)
        elif silent:
            torch.nn.init.normal_(parameter, std=0.1)
    for head in model.handover.values():
        torch.nn.init.normal_(head[1].weight, std=0.5)


@torch.no_grad()
def often_ending(model: ZipperModel, factor: float = 2.0) -> ZipperModel:
    """Let EOS win more often, so that written segments differ in length."""
    for tower in model.towers.values():
        tower.backbone.get_output_embeddings().weight[1] *= factor
    return model


def doc(*segments: tuple[str, list[int]], target: bool = False) -> Document:
    """A document from ``(modality, ids)``."""
    return Document([Segment(name, ids=list(ids), target=target) for name, ids in segments])


def ids_of(documents: Sequence[_Document]) -> list[list[tuple[str, list[int]]]]:
    """Documents as plain data, for comparison."""
    return [[(s.modality, list(s.ids or [])) for s in d] for d in documents]


def bare_logits(model: ZipperModel, name: str, stream: TowerBatch) -> torch.Tensor:
    """The backbone's own logits for one side of a batch."""
    mask = stream["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    backbone = model.tower(name).backbone
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        return backbone(input_ids=stream["input_ids"], attention_mask=mask, position_ids=positions).logits
    return backbone(input_ids=stream["input_ids"], attention_mask=mask).logits


@torch.no_grad()
def naive_greedy(
    model: ZipperModel,
    documents: Sequence[Document],
    schedule: Sequence[str],
    limit: int,
    side: str = "right",
    guidance: float = 1.0,
) -> list[list[tuple[str, list[int]]]]:
    """Greedy decoding without any cache: the growing documents go through the whole model for every token."""
    grown = [Document([Segment(s.modality, ids=list(s.ids or [])) for s in d]) for d in documents]
    involved = [{*d.modalities, *schedule} for d in grown]
    for name in schedule:
        special = model.specials[name]
        for d in grown:
            d.segments.append(Segment(name, ids=[]))
        done = [False] * len(grown)
        for _ in range(limit):
            batch = collate(grown, model.specials, side=side, involved=involved, open_last=True)  # type: ignore[arg-type]
            logits = model(batch).logits[name].log_softmax(-1)
            if guidance != 1.0:
                bare = bare_logits(model, name, batch[name]).log_softmax(-1)
                logits = bare + guidance * (logits - bare)
            logits[..., [special.bos, special.pad]] = -torch.inf
            for row, d in enumerate(grown):
                last = int((batch[name]["segments"][row] >= 0).nonzero().max())
                token = int(logits[row, last].argmax())
                done[row] |= token == special.eos
                if not done[row]:
                    d[-1].ids.append(token)  # type: ignore[union-attr]
    return ids_of(grown)


def limits(model: ZipperModel, limit: int, **more: object) -> dict[str, dict[str, object]]:
    """Generation settings for every tower."""
    return {name: {"max_new_tokens": limit, **more} for name in model.names}


def tiny_whisper(folder: Path) -> Path:
    """A random one for English, whose tokenizer knows a few letters."""
    tokens = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", *"abcdefgh"]
    tokenizer = WhisperTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    rest = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": len(tokenizer)}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 1}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, **rest, **special, max_target_positions=20))
    model.save_pretrained(folder)
    own = {"no_timestamps_token_id": 2, "is_multilingual": False, "max_length": 8, **special}
    (folder / "generation_config.json").write_text(json.dumps(own))
    return folder
