"""Settings of a segment: those of transformers' `GenerationConfig` and one of ours, checked before any is written."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig
from transformers.generation import GenerationMode

MAX_NEW_TOKENS = 256
STOP_THRESHOLD = "stop_threshold"
"""The one setting of ours beside those of `GenerationConfig` (see `logits.py`)."""


class OwnSettings(GenerationConfig):
    """Settings as they were given. `generate()` fills what is not given from the backbone's own generation config, such
    as beams or a repetition penalty, which nobody asked for here; of this one it takes the library's defaults."""

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> Any:
        """As of its base, but whatever is offered for what is not given, it is the default."""
        if defaults_only:
            kwargs = self._get_default_generation_params()
        return super().update(defaults_only, allow_custom_entries, **kwargs)


def known_settings() -> set[str]:
    """What may stand in a modality's settings."""
    return {*vars(GenerationConfig()), STOP_THRESHOLD}


def generation_config(name: str, settings: Mapping[str, Any] | GenerationConfig | None) -> GenerationConfig:
    """A copy to be written to, with our defaults.

    Raises:
        ValueError: for a setting that is unknown, of another type, out of range, or that does not go with another.
    """
    if isinstance(settings, GenerationConfig):
        config = OwnSettings()
        config.__dict__.update(copy.deepcopy(settings.__dict__))
    else:
        if unknown := sorted(set(settings or {}) - known_settings()):
            raise ValueError(f"settings for {name!r}: unknown {unknown}; see transformers.GenerationConfig")
        fields = {"do_sample": False, **(settings or {})}
        _check_types(name, fields)
        threshold = fields.pop(STOP_THRESHOLD, None)
        try:
            config = OwnSettings(**fields)
        except TypeError as error:
            raise ValueError(f"settings for {name!r}: {error}") from error
        setattr(config, STOP_THRESHOLD, threshold)
    if config.max_new_tokens is None and config.max_length is None:
        config.max_new_tokens = MAX_NEW_TOKENS
    threshold = getattr(config, STOP_THRESHOLD, None)
    if threshold is not None and not 0.0 < threshold <= 1.0:
        raise ValueError(f"settings for {name!r}: {STOP_THRESHOLD} must be in (0, 1], got {threshold}")
    if config.num_beams is not None and config.num_beams < 1:
        raise ValueError(f"settings for {name!r}: num_beams must be at least 1, got {config.num_beams}")
    searched = config.num_beams not in (None, 1) or config.get_generation_mode() is GenerationMode.ASSISTED_GENERATION
    if (scale := config.guidance_scale) not in (None, 1) and searched:
        raise ValueError(f"settings for {name!r}: guidance_scale={scale} goes with greedy search and sampling only")
    if config.num_return_sequences not in (None, 1):
        raise ValueError(
            f"settings for {name!r}: num_return_sequences={config.num_return_sequences}, but a document has one next "
            "segment"
        )
    if config.assistant_early_exit is not None:
        raise ValueError(
            f"settings for {name!r}: assistant_early_exit={config.assistant_early_exit}, but a tower without its last "
            "layers would lack the zips there; prompt_lookup_num_tokens proposes tokens without a second model"
        )
    return config


def _check_types(name: str, fields: Mapping[str, Any]) -> None:
    """Raise `ValueError` for text where a number or a truth value belongs: ``"False"`` would count as true."""
    like = {**GenerationConfig._get_default_generation_params(), "max_new_tokens": 0, "guidance_scale": 1.0}
    like |= {STOP_THRESHOLD: 0.5, "early_stopping": None}  # which may be a word
    for key, value in fields.items():
        expected = like.get(key)
        if value is None or not isinstance(expected, bool | int | float):
            continue
        kind = bool if isinstance(expected, bool) else int | float
        if not isinstance(value, kind):
            wanted = "true or false" if kind is bool else "a number"
            raise ValueError(f"settings for {name!r}: {key} must be {wanted}, got {value!r}")
