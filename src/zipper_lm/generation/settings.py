"""Settings of a segment: those of transformers' `GenerationConfig` and three of ours, checked before any is written.

Each is either followed or refused by name. One that only a newer transformers knows is refused, too: nobody has tried
what it does between zips.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from transformers import GenerationConfig

from zipper_lm.data.collation import Specials
from zipper_lm.fusion.interface import OwnSettings
from zipper_lm.generation.sampling import SEEDS

MAX_NEW_TOKENS = 256
STOP_THRESHOLD = "stop_threshold"
"""A setting of ours beside those of `GenerationConfig` (see `logits.py`)."""
SEED = "seed"
"""Another one: with it, what is drawn depends on nothing else (see `sampling.py`)."""
BEST_BY = "best_by"
"""The third: what chooses among several samples (see `read_back.py`)."""
SCORE, READING = "score", "reading"
OURS = (STOP_THRESHOLD, SEED, BEST_BY)

FOLLOWED = {
    *OURS,
    # when it ends
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time"),
    *("stop_strings", "forced_eos_token_id"),
    # how the next token is found
    *("do_sample", "num_beams", "early_stopping", "length_penalty", "num_return_sequences", "output_scores"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "disable_compile"),
    # what is changed in the probabilities
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "exponential_decay_length_penalty"),
    *("guidance_scale", "renormalize_logits", "remove_invalid_values", "watermarking_config"),
}
"""What a segment follows. A word of `GenerationConfig` that is not here has to be among `REFUSED`, with a reason."""

_SECOND = "no second model proposes tokens here; prompt_lookup_num_tokens proposes them without one"
_RETURNED = "what is returned is documents"
_ENCODER = "it is for models with an encoder"
_GONE = "transformers no longer has it"
REFUSED = {
    "bos_token_id": "a tower's special ids are its own",
    "eos_token_id": "a tower's special ids are its own",
    "pad_token_id": "a tower's special ids are its own",
    "return_dict_in_generate": _RETURNED,
    "output_logits": f"{_RETURNED}; output_scores adds log-probabilities to written segments",
    "output_attentions": f"{_RETURNED}; zipper_lm.evaluation.attention.attention_maps shows attention",
    "output_hidden_states": _RETURNED,
    "decoder_start_token_id": _ENCODER,
    "forced_bos_token_id": _ENCODER,
    "token_healing": "a segment begins with BOS, so there is no broken word before it to heal",
    "assistant_early_exit": "a tower without its last layers would lack the zips there; prompt_lookup_num_tokens "
    "proposes tokens without a second model",
    "use_mtp": "a tower's heads for further tokens read no zips; prompt_lookup_num_tokens proposes tokens without them",
    "is_assistant": _SECOND,
    "num_assistant_tokens": _SECOND,
    "num_assistant_tokens_schedule": _SECOND,
    "assistant_confidence_threshold": _SECOND,
    "assistant_ensemble_weight": _SECOND,
    "assistant_lookbehind": _SECOND,
    "target_lookbehind": _SECOND,
    "speculation_type": _SECOND,
    "compile_config": "a compiled forward cannot ask who listens to its layers",
    "continuous_batching_config": "all documents of a call are written together",
    "low_memory": _GONE,
    "penalty_alpha": _GONE,
    "dola_layers": _GONE,
    "diversity_penalty": _GONE,
    "num_beam_groups": _GONE,
    "constraints": _GONE,
    "force_words_ids": _GONE,
}
"""What a segment does not follow, and why."""

_SAYS_NOTHING = {"transformers_version"}  # of how to write
_ONLY_WITH = {
    "do_sample": (SEED, "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    "num_beams": ("early_stopping", "length_penalty"),
    "num_return_sequences": (BEST_BY,),
    "prompt_lookup_num_tokens": ("max_matching_ngram_size",),
    "cache_implementation": ("cache_config", "max_cache_len"),
}
"""Settings that change nothing unless another is set."""


def known_settings() -> set[str]:
    """The names of settings, of those that are refused, too."""
    return {*vars(GenerationConfig()), *OURS}


def generation_config(
    name: str, settings: Mapping[str, Any] | GenerationConfig | None, special: Specials | None = None
) -> GenerationConfig:
    """A copy to be written to, with our defaults.

    Args:
        name: the modality. settings: as given. special: its ids, where they are known: a config that was loaded with a
            backbone may name them.

    Raises:
        ValueError: for a setting that is unknown, refused, of another type, out of range, or that does not go with
            another.
    """
    if isinstance(settings, GenerationConfig):
        given = {k: v for k, v in vars(settings).items() if v is not None and not k.startswith("_")}
    elif settings is None or isinstance(settings, Mapping):
        given = dict(settings or {})
    else:
        raise ValueError(
            f"settings for {name!r} must be a mapping or a GenerationConfig, got {type(settings).__name__}"
        )
    if unknown := sorted(str(key) for key in set(given) - known_settings()):
        raise ValueError(f"settings for {name!r}: unknown {unknown}; see transformers.GenerationConfig")
    _check_followed(name, given, special)
    _check_types(name, given)
    fields = {"do_sample": False, **copy.deepcopy({k: v for k, v in given.items() if k in FOLLOWED})}
    ours = {key: fields.pop(key, None) for key in OURS}
    try:
        config = OwnSettings(**fields)
    except Exception as error:  # of any kind: what is no config of a watermark is asked for its attributes
        raise ValueError(f"settings for {name!r}: {error}") from error
    for key, value in ours.items():
        setattr(config, key, value)
    if config.max_new_tokens is None and config.max_length is None:
        config.max_new_tokens = MAX_NEW_TOKENS
    _check_together(name, config)
    return config


@contextmanager
def at_fault(name: str) -> Iterator[None]:
    """An error that transformers' own generation raises in the block, of whatever kind, becomes a `ValueError` about
    the settings of `name`: of many it finds out at the first token only what is wrong, such as ids that no tower has.

    Raises:
        ValueError: then.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        places = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        deepest = next((place for place in reversed(places) if not place.startswith("torch")), "")
        if not deepest.startswith(("transformers.generation", "transformers.cache_utils")):
            raise
        told = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"settings for {name!r}: {told or type(error).__name__}") from error


def _check_followed(name: str, given: Mapping[str, Any], special: Specials | None) -> None:
    """Raise `ValueError` for what is set and not followed. What says what would be without it is no setting."""
    without = GenerationConfig._get_default_generation_params()
    own = {f"{k}_token_id": v for k, v in special._asdict().items()} if special is not None else {}
    for key, value in given.items():
        if key in FOLLOWED or key in _SAYS_NOTHING or value is None or value is False:
            continue
        if (key in without and value == without[key]) or (key in own and value in (own[key], [own[key]])):
            continue
        reason = REFUSED.get(key, "it is new in transformers, and was not tried here yet")
        here = f" ({own[key]})" if key in own else ""
        raise ValueError(f"settings for {name!r}: {key}={value!r} is not followed: {reason}{here}")


def _check_together(name: str, config: GenerationConfig) -> None:
    """Raise `ValueError` for values out of range and settings that exclude each other; warn of those without effect."""
    threshold = getattr(config, STOP_THRESHOLD)
    if threshold is not None and not 0.0 < threshold <= 1.0:
        raise ValueError(f"settings for {name!r}: {STOP_THRESHOLD} must be in (0, 1], got {threshold}")
    if (by := getattr(config, BEST_BY)) not in (None, SCORE, READING):
        raise ValueError(f"settings for {name!r}: {BEST_BY} must be {SCORE!r} or {READING!r}, got {by!r}")
    _check_seed(name, config)
    _check_choice(name, config)
    for field, most in _MOST.items():
        if (value := getattr(config, field, None)) is not None and value > most:
            raise ValueError(f"settings for {name!r}: {field} must be at most {most}, got {value}")
    if config.cache_implementation not in (None, *_GROWS):
        for field in ("max_length", "max_new_tokens"):
            if (value := getattr(config, field)) is not None and value > _MOST["max_cache_len"]:
                raise ValueError(
                    f"settings for {name!r}: cache_implementation={config.cache_implementation!r} takes room for all "
                    f"tokens at once, so {field} must be at most {_MOST['max_cache_len']}, got {value}"
                )
    for field in ("num_beams", "num_return_sequences", "prefill_chunk_size"):
        if (value := getattr(config, field, None)) is not None and value < 1:
            raise ValueError(f"settings for {name!r}: {field} must be at least 1, got {value}")
    beams, several = config.num_beams not in (None, 1), config.num_return_sequences not in (None, 1)
    assisted = config.prompt_lookup_num_tokens is not None
    if (scale := config.guidance_scale) not in (None, 1) and (beams or assisted):
        raise ValueError(f"settings for {name!r}: guidance_scale={scale} goes with greedy search and sampling only")
    if assisted and (beams or several):
        raise ValueError(
            f"settings for {name!r}: prompt_lookup_num_tokens goes with greedy search and a single sample only"
        )
    for field, other in without_effect(config):
        value = getattr(config, field)
        warnings.warn(f"settings for {name!r}: {field}={value!r} has no effect without {other}", stacklevel=3)
    if config.cache_implementation == "paged":
        raise ValueError(f"settings for {name!r}: cache_implementation='paged' is for a server of its own")


_MOST = {"num_beams": 1024, "num_return_sequences": 1024, "max_cache_len": 1 << 17}
"""What is taken at once, each with the memory of a whole row or token."""
_GROWS = ("dynamic", "dynamic_full", "offloaded", "quantized")
"""Caches that take memory as tokens come."""


def without_effect(config: GenerationConfig) -> list[tuple[str, str]]:
    """Settings that change nothing, each with the one that it would need."""
    without = GenerationConfig._get_default_generation_params()
    return [
        (field, other)
        for other, fields in _ONLY_WITH.items()
        if getattr(config, other, None) in (None, without.get(other))
        for field in fields
        if getattr(config, field, None) not in (None, without.get(field))
    ]


_OF_A_DRAW = ("temperature", "top_p", "min_p", "top_k")
_SMALLEST, _LARGEST = 1e-20, 1e20
"""Of what scores are divided by or multiplied with: they stay numbers in float32."""
_LENGTH = (lambda v: v < SEEDS, "less than 2**62")  # how much less than 0 is transformers' to say
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda v: _SMALLEST <= v <= _LARGEST, f"a number from {_SMALLEST:g} to {_LARGEST:g}"),
    "top_p": (lambda v: 0.0 <= v <= 1.0, "in [0, 1]"),
    "min_p": (lambda v: 0.0 <= v <= 1.0, "in [0, 1]"),
    "top_k": (lambda v: 0 <= v < SEEDS, "a whole number from 0 to 2**62 - 1"),
    "repetition_penalty": (lambda v: _SMALLEST <= v <= _LARGEST, f"a number from {_SMALLEST:g} to {_LARGEST:g}"),
    "guidance_scale": (lambda v: -_LARGEST <= v <= _LARGEST, f"a number from {-_LARGEST:g} to {_LARGEST:g}"),
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens"), _LENGTH),
}


def _check_choice(name: str, config: GenerationConfig) -> None:
    """Raise `ValueError` for what no token can be chosen by. transformers says so of its own processors, at the first
    token; a captured step would divide by it."""
    for key, (fits, wanted) in _RANGES.items():
        value = getattr(config, key, None)
        if value is not None and (config.do_sample or key not in _OF_A_DRAW) and not fits(value):
            raise ValueError(f"settings for {name!r}: {key} must be {wanted}, got {value!r}")
    ids = config.suppress_tokens
    if ids is not None and not (isinstance(ids, list | tuple) and all(type(i) is int for i in ids)):
        raise ValueError(f"settings for {name!r}: suppress_tokens must be a list of ids, got {ids!r:.80}")
    strings: Any = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings
    listed = strings is None or isinstance(strings, list | tuple)
    if not listed or not all(isinstance(s, str) and s for s in strings or ()):
        raise ValueError(f"settings for {name!r}: stop_strings must be strings, not empty, got {strings!r:.80}")


def _check_seed(name: str, config: GenerationConfig) -> None:
    """Raise `ValueError` for a seed out of range, or beside what draws otherwise."""
    if (seed := getattr(config, SEED)) is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEEDS:
        raise ValueError(f"settings for {name!r}: {SEED} must be a whole number from 0 to 2**62 - 1, got {seed!r}")
    if (beams := config.num_beams) not in (None, 1):
        raise ValueError(f"settings for {name!r}: {SEED}={seed} does not go with num_beams={beams}")
    others = ("prompt_lookup_num_tokens", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "watermarking_config")
    without = GenerationConfig._get_default_generation_params()
    for key in others:
        if (value := getattr(config, key, None)) not in (None, without.get(key)):
            raise ValueError(
                f"settings for {name!r}: {SEED}={seed} goes with temperature, top_k, top_p and min_p, not with "
                f"{key}={value!r}"
            )


def _check_types(name: str, given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for text where a number or a truth value belongs: ``"False"`` would count as true."""
    like = {**GenerationConfig._get_default_generation_params(), STOP_THRESHOLD: 0.5}
    like |= dict.fromkeys(("max_new_tokens", "min_new_tokens", "prompt_lookup_num_tokens", "max_cache_len"), 0)
    like |= dict.fromkeys(("max_matching_ngram_size", "prefill_chunk_size"), 0)
    like |= dict.fromkeys(("guidance_scale", "min_p", "top_h", "max_time"), 1.0)
    like |= {"early_stopping": None, "renormalize_logits": False, "disable_compile": False}  # the first may be a word
    for key, value in given.items():
        expected = like.get(key)
        if value is None or not isinstance(expected, bool | int | float):
            continue
        if isinstance(expected, bool):
            fits, wanted = isinstance(value, bool), "true or false"
        elif isinstance(expected, int):
            fits, wanted = isinstance(value, Integral) and not isinstance(value, bool), "a whole number"
        else:
            fits, wanted = isinstance(value, Real) and not isinstance(value, bool), "a number"
        if not fits:
            raise ValueError(f"settings for {name!r}: {key} must be {wanted}, got {value!r}")
