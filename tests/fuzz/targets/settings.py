"""Generation settings, as a checkpoint's `generation.json`, a recipe or a caller has them: checked, then written by."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

from fuzz.grammar import as_json, hostile
from fuzz.target import Target
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from tiny_served import served_model

from zipper_lm import Document, Segment
from zipper_lm.generation.settings import FOLLOWED, REFUSED, generation_config

USUAL: dict[str, list[Any]] = {
    "do_sample": [True, False],
    "temperature": [0.7, 0.0, 1e-9, 1e9],
    "top_k": [0, 1, 5, 10**9],
    "top_p": [0.0, 0.9, 1.0],
    "min_p": [0.0, 0.1, 1.0],
    "top_h": [0.1, 0.9],
    "typical_p": [0.5, 1.0],
    "epsilon_cutoff": [0.1],
    "eta_cutoff": [0.1],
    "num_beams": [1, 2, 4, 10**6],
    "num_return_sequences": [1, 2, 10**6],
    "early_stopping": [True, "never"],
    "length_penalty": [1.0, -5.0],
    "repetition_penalty": [1.2, 0.1],
    "no_repeat_ngram_size": [2, 10**6],
    "encoder_no_repeat_ngram_size": [2],
    "encoder_repetition_penalty": [1.5],
    "max_new_tokens": [1, 4, 10**9],
    "max_length": [4, 20, 10**9],
    "min_new_tokens": [0, 2, 10**9],
    "min_length": [0, 2],
    "max_time": [0.0, 1.0],
    "stop_strings": ["one", ["one", "two"], "a" * 10_000],
    "cache_implementation": ["static", "dynamic", "offloaded", "quantized", "hybrid", "sliding_window", "paged"],
    "cache_config": [{"backend": "quanto", "nbits": 4}, {"max_cache_len": 10**9}],
    "max_cache_len": [64, 10**9],
    "prefill_chunk_size": [1, 2, 10**9],
    "prompt_lookup_num_tokens": [2, 10**9],
    "max_matching_ngram_size": [2, 10**9],
    "guidance_scale": [1.0, 1.5, -3.0],
    "suppress_tokens": [[1, 5], [10**9], [-1]],
    "begin_suppress_tokens": [[1, 5], [10**9]],
    "bad_words_ids": [[[5], [6, 7]], [[10**9]]],
    "sequence_bias": [[[[5], 1.5]], [[[10**9], 1.0]]],
    "forced_eos_token_id": [1, 10**9, [1, 2]],
    "exponential_decay_length_penalty": [[2, 1.5], [2, 1e300]],
    "renormalize_logits": [True],
    "remove_invalid_values": [True],
    "watermarking_config": [{"bias": 2.5, "seeding_scheme": "selfhash"}, {"context_width": 10**9}],
    "output_scores": [True],
    "use_cache": [True, False],
    "disable_compile": [True],
    "stop_threshold": [0.5],
    "seed": [0, 7, 2**62],
}


def make() -> Target:
    """Each setting with what it usually holds, and with what it should not."""
    run(b"{}", Path())  # its model's codecs are fitted on cores that a program counts, and all is imported
    return Target(name="settings", run=run, share=10, inputs=_inputs())


def run(data: bytes, folder: Path) -> None:
    """A segment of each modality is written by what passes."""
    given = json.loads(data)
    model = _model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("text", "speech"):
            generation_config(name, given, model.specials[name])
        short = dict(given)  # how long a model may write is for its user to say, or else for the model's room
        if not {"max_new_tokens", "max_length"} & set(short):
            short["max_new_tokens"] = 4
        for key, few in (("max_new_tokens", 4), ("max_length", 20)):
            if isinstance(most := short.get(key), int) and most > few:
                short[key] = few
        document = Document([Segment("speech", ids=[3, 4, 5])])
        model.generate([document], ["text"], settings={"text": short})


@functools.cache
def _model() -> Any:
    return served_model(tokens=4)


@st.composite
def _inputs(draw: DrawFn) -> bytes:
    settings: dict[str, Any] = {}
    for key in draw(st.lists(st.sampled_from(sorted(USUAL)), min_size=1, max_size=4, unique=True)):
        settings[key] = draw(st.sampled_from(USUAL[key]) if draw(st.integers(0, 2)) else hostile())
    if not draw(st.integers(0, 5)):
        settings[draw(st.sampled_from(sorted(FOLLOWED | set(REFUSED))))] = draw(hostile())
    return as_json(settings)
