"""A tiny random model of each causal-LM family of the installed transformers, and what is known of those that fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_IMAGE_MODELING_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from zipper_lm.evaluation.parity import Parity, check_parity
from zipper_lm.fusion.config import ZipperConfig
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.tower import write_plainly
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.fusion.zip_spec import ZipSpec
from zipper_lm.generation.engine.capture import Capture, learn_capture

HIDDEN, HEADS, LAYERS, VOCABULARY = 32, 4, 4, 96

SIZES: list[tuple[int, str]] = [
    (
        HIDDEN,
        "hidden_size hidden_size_global d_model n_embd emb_dim embedding_dim word_embed_proj_dim embedding_size "
        "input_embedding_size output_embedding_size lru_width",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers "
        "num_decoder_layers num_encoder_layers num_experts moe_num_experts n_routed_experts num_local_experts "
        "num_global_layers",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads attention_heads linear_num_value_heads "
        "linear_num_heads swa_num_attention_heads mamba_d_conv",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok "
        "num_experts_per_token moe_topk moe_k n_group num_expert_group index_n_heads ngram zero_expert_num "
        "num_shared_experts n_shared_experts moe_num_shared_experts o_groups n_groups n_mamba_heads num_mem_blocks",
    ),
    (1, "topk_group first_k_dense_replace num_codebooks moe_layer_start_index num_dense_layers"),
    (
        8,
        "head_dim d_head swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim qk_rope_head_dim "
        "qk_nope_head_dim v_head_dim qk_head_dim index_head_dim d_kv dim_head attention_head_size kv_channels "
        "rotary_dim mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank chunk_size mamba_chunk_size "
        "block_size adapter_rank d_rel global_head_dim mamba_head_dim mamba_d_head mamba_headdim mamba_n_heads",
    ),
    (
        16,
        "kv_lora_rank q_lora_rank o_lora_rank hidden_size_per_layer_input router_hidden_size sliding_window "
        "sliding_window_size attention_chunk_size pronunciation_embed_dim shape_embed_dim ffn_round_up_to_multiple_of "
        "gated_norm_rank laurel_rank attention_window_size",
    ),
    (
        48,
        "intermediate_size moe_intermediate_size shared_expert_intermediate_size ffn_dim decoder_ffn_dim "
        "ffn_hidden_size encoder_ffn_dim dff dim_ff n_inner feed_forward_size expert_ffn_hidden_size "
        "intermediate_size_mlp "
        "moe_shared_expert_intermediate_size shared_intermediate_size dense_intermediate_size d_inner "
        "prefix_dense_intermediate_size shared_experts_intermediate_size",
    ),
    (
        64,
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
        "context_length model_max_length",
    ),
    (
        VOCABULARY,
        "vocab_size decoder_vocab_size vocab_size_per_layer_input pronunciation_vocab_size "
        "shape_vocab_size unpadded_vocab_size audio_vocab_size",
    ),
]
SIZE = {name: size for size, names in SIZES for name in names.split()}

ATTENTION = ["sliding_attention", "full_attention"]
HYBRID = ["linear_attention", "full_attention"] * 2
DOTS3 = {
    "per_layer_config": {},
    "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "head_dim": 16,
}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": HYBRID},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": LAYERS},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": HIDDEN},
        "decoder_config": {"hidden_size_global": HIDDEN},
    },
    "cohere_compass_text": {
        "layer_types": ATTENTION * 2,
        "rope_parameters": {t: {"rope_type": "default", "rope_theta": 1e4} for t in ATTENTION},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "dots3_note": DOTS3,
    "dots3_note_text": DOTS3,
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ATTENTION * 2},
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": LAYERS,
            "num_kv_shared_layers": LAYERS,
        }
    },
    "gemma4_unified_assistant": {
        "text_config": {"num_hidden_layers": LAYERS, "num_kv_shared_layers": 2, "layer_types": ATTENTION * 2}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "qk_head_dim": 16, "ffn_hidden_size": 48},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": INDEXER,
    "qwen4_exp_text": INDEXER,
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,
    },
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8},
}


# Layer lists that must be named: the family has two, and both are decoder layers.
LAYERS_PATH = {"blt": "model.local_decoder.layers", "hrm_text": "model.H_module.layers"}


def families() -> list[str]:
    """Model types of the causal-LM mapping, plus ImageGPT."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "imagegpt"]


def tiny_kwargs(config_class: type[PreTrainedConfig], overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Arguments that make a config small: every size that the class is known to have, sub-configs too."""
    overrides = dict(overrides or {})
    try:
        default = config_class()
    except Exception:  # a class whose own defaults contradict each other
        default = config_class(**overrides)
    kwargs: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            kwargs[name] = {"model_type": value.model_type, **tiny_kwargs(type(value), overrides.pop(name, None))}
        elif name == "is_decoder":
            kwargs[name] = True
        elif isinstance(value, int) and name in SIZE:
            kwargs[name] = min(value, SIZE[name])
        elif name in ("bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_eos_token_id"):
            kwargs[name] = 2
        elif name == "pad_token_id":
            kwargs[name] = 0
        elif name.endswith("_token_id") and isinstance(value, int):
            kwargs[name] = 3
    if "kv_lora_rank" in vars(default):  # latent attention has as many key heads as heads
        kwargs["num_key_value_heads"] = HEADS
    return kwargs | overrides


def tiny_model(family: str) -> PreTrainedModel:
    """A model with random, non-degenerate weights (nothing is left at exactly zero or one)."""
    config_class = CONFIG_MAPPING[family]
    mapping = MODEL_FOR_CAUSAL_IMAGE_MODELING_MAPPING if family == "imagegpt" else MODEL_FOR_CAUSAL_LM_MAPPING
    model_class = mapping[config_class]
    expected = model_class.config_class
    if not issubclass(config_class, expected) and expected in config_class.sub_configs.values():
        config_class = expected  # composite, and the model takes its text half
    config = config_class(**tiny_kwargs(config_class, OVERRIDES.get(family)))
    torch.manual_seed(0)
    model = model_class(config).eval()
    # MusicGen's own generate() wants one; a checkpoint brings it along.
    model.generation_config.decoder_start_token_id = 2
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@dataclass(frozen=True)
class Known:
    """Why a family is no tower.

    Attributes:
        kind: for the table.
        why: for the reader.
        says: parts of what the check says, any one of them, so that it is noticed when the reason no longer holds.
    """

    kind: str
    why: str
    says: tuple[str, ...]

    def explains(self, reason: str) -> bool:
        """Whether it is this that the check says."""
        return any(part in reason for part in self.says)


NO_CONFIG, NOT_CAUSAL, NEEDS_OTHER, UNSUPPORTED = (
    "no valid tiny config",
    "not causal",
    "needs an encoder or another model",
    "really unsupported",
)
LEAK = "the last token changes logits before it"

DRAFT = Known(
    NEEDS_OTHER,
    "a draft head whose layers only read the main model's cache",
    ("shared_kv_states", "types producing a cache"),
)

KNOWN = {
    "cpmant": Known(NOT_CAUSAL, "the prompt is read in both directions", (LEAK,)),
    "gemma3n": Known(
        NO_CONFIG,
        "its vision tower needs timm, and with it the tiny config is invalid; as `gemma3n_text` it passes",
        ("timm", "'sliding_attention' is not in list"),
    ),
    "gemma4_assistant": DRAFT,
    "gemma4_unified_assistant": DRAFT,
    "prophetnet": Known(UNSUPPORTED, "its n-gram streams lie one after the other in time", ("passes [(3, 15, 32)]",)),
    "reformer": Known(NOT_CAUSAL, "hashing: later tokens decide which earlier ones share a chunk", (LEAK,)),
    "xlm": Known(UNSUPPORTED, "no layers: attentions and feed-forwards are separate lists", ("no single list",)),
    "xlnet": Known(UNSUPPORTED, "upstream, the one-way model fails on a mask of several rows", ("broadcast shape",)),
}

# Seen with 5.17.0 and gone in 5.23.0; in between either may hold.
NEWER = Version("5.23.0")
KNOWN_BEFORE = {
    "big_bird": Known(NOT_CAUSAL, "without a mask", (LEAK,)),
    "cohere_compass_text": Known(NO_CONFIG, "its weights cannot be initialised", ("must match the existing size (0)",)),
    "doge": Known(NOT_CAUSAL, "without a mask", (LEAK,)),
    "megatron-bert": Known(NOT_CAUSAL, "without a mask", (LEAK,)),
    "rembert": Known(NOT_CAUSAL, "without a mask", (LEAK,)),
    "roformer": Known(NOT_CAUSAL, "without a mask", (LEAK,)),
}


def may_fail(family: str) -> Known | None:
    """Why a family may fail with an older transformers than the one the table was made with."""
    return KNOWN_BEFORE.get(family) if Version(transformers.__version__) < NEWER else None


@dataclass(frozen=True)
class Outcome:
    """What came out for one family; `reason` is empty if it passed."""

    family: str
    reason: str
    parity: Parity | None = None

    @property
    def passed(self) -> bool:
        return not self.reason


def examine(family: str) -> Outcome:
    """Build the family's tiny model and check it."""
    try:
        model = tiny_model(family)
    except Exception as error:  # of any kind: what the family says to a config
        return Outcome(family, f"no model: {type(error).__name__}: {error}")
    parity = check_parity(model, layers=LAYERS_PATH.get(family))
    faults = [f"{check}: {what}" for check, what in parity.problems.items()] + parity.lacks
    return Outcome(family, "; ".join(faults), parity)


def captured(family: str) -> Capture:
    """Whether a writing step of the family's tiny model can be captured."""
    backbone = tiny_model(family)
    write_plainly(backbone)
    special = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    specs = {"family": TowerSpec(source="", layers=LAYERS_PATH.get(family), **special)}
    specs["other"] = TowerSpec(source="", **special)
    zips = [ZipSpec(reader="family", source="other", layers=[1], source_layers=[1])]
    config = ZipperConfig(towers=specs, zips=zips)
    return learn_capture(ZippedTowers(config, {"family": backbone, "other": tiny_model("llama")}), "family")
