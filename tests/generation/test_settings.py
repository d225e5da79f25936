"""What settings may say, that it is followed, and that nobody else says it."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import doc, ids_of, limits, often_ending, tiny_model
from transformers import GenerationConfig

from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.collation import Specials
from zipper_lm.generation.settings import FOLLOWED, REFUSED, generation_config, known_settings

RAGGED = [doc(("speech", [5, 6, 7, 8])), doc(("text", [5, 6]), ("speech", [9]))]


@pytest.mark.parametrize(
    "shipped",
    [{"num_beams": 3}, {"guidance_scale": 3.0}, {"repetition_penalty": 5.0}, {"num_return_sequences": 2}, {"top_k": 1}],
    ids=str,
)
def test_what_a_backbone_ships_for_generation_is_not_asked_for(shipped: dict[str, float]) -> None:
    """Beams, guidance or a penalty of its generation_config.json came into every call, behind all checks: other tokens
    than greedy search writes, or a crash."""
    model = tiny_model(gate=0.5)
    plain = model.generate(RAGGED, ["text"], settings={"text": {"max_new_tokens": 6}})
    for name, value in shipped.items():
        setattr(model.tower("text").backbone.generation_config, name, value)
    for settings in ({"max_new_tokens": 6}, GenerationConfig(max_new_tokens=6, do_sample=False)):
        assert ids_of(model.generate(RAGGED, ["text"], settings={"text": settings})) == ids_of(plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": "abc"}, "max_new_tokens must be a whole number, got 'abc'"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be a number from 1e-20 to 1e.20, got 0.0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be a number from 1e-20 to 1e.20, got nan"),
        ({"do_sample": True, "top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5"),
        ({"do_sample": True, "top_k": -1}, r"top_k must be a whole number from 0 to 2\*\*62 - 1, got -1"),
        ({"do_sample": True, "min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number from 1e-20 to 1e.20, got 0.0"),
        ({"guidance_scale": float("nan")}, r"guidance_scale must be a number from -1e\+20 to 1e\+20, got nan"),
        ({"do_sample": True, "temperature": 1e308}, "temperature must be a number from 1e-20 to"),
        ({"do_sample": True, "temperature": 1e-300}, "temperature must be a number from 1e-20 to"),
        ({"do_sample": True, "top_k": 10**30}, "top_k must be a whole number from 0 to"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty must be a number from 1e-20 to"),
        ({"guidance_scale": 1e300}, r"guidance_scale must be a number from -1e\+20 to"),
        ({"min_new_tokens": 10**30}, r"min_new_tokens must be less than 2\*\*62, got 10"),
        ({"max_new_tokens": 10**30}, r"max_new_tokens must be less than 2\*\*62, got 10"),
        ({"suppress_tokens": "abc"}, "suppress_tokens must be a list of ids, got 'abc'"),
        ({"stop_strings": [""]}, r"stop_strings must be strings, not empty, got \[''\]"),
        ({"do_sample": "False"}, "do_sample must be true or false, got 'False'"),
        ({"num_beams": "2x"}, "num_beams must be a whole number"),
        ({"stop_threshold": "half"}, "stop_threshold must be a number"),
        ({"guidance_scale": "much"}, "guidance_scale must be a number"),
        ({"num_beams": 2.0}, "num_beams must be a whole number"),
        ({"min_new_tokens": True}, "min_new_tokens must be a whole number"),
        ({"max_time": "1s"}, "max_time must be a number"),
    ],
)
def test_settings_of_another_type_are_refused(settings: dict[str, str], message: str) -> None:
    """They ended in a TypeError deep inside, or, like "False", counted as true."""
    with pytest.raises(ValueError, match=f"settings for 'text': {message}"):
        tiny_model().generate(RAGGED, ["text"], settings={"text": settings})


@pytest.mark.parametrize("threshold", [0, -0.5, 1.5])
def test_what_is_no_probability(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"'text': stop_threshold must be in \(0, 1\], got"):
        tiny_model().generate([doc(("speech", [5]))], ["text"], settings={"text": {"stop_threshold": threshold}})


# --- every field of transformers' GenerationConfig ----------------------------------------------------------------

SAID = {"transformers_version"}  # metadata of a saved file
PLAIN: dict[str, Any] = {"max_new_tokens": 8}
SAMPLED = {**PLAIN, "do_sample": True}
BEAMS = {**PLAIN, "num_beams": 3}
# A value of each setting that is followed, what it stands beside, and whether other tokens are written with it.
TRIED: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "max_length": (15, {}, True),
    "max_new_tokens": (3, {}, True),
    "min_length": (14, PLAIN, True),
    "min_new_tokens": (8, PLAIN, True),
    "max_time": (1e-6, PLAIN, True),
    "forced_eos_token_id": (1, PLAIN, True),
    "do_sample": (True, PLAIN, True),
    "num_beams": (3, PLAIN, True),
    "early_stopping": (True, BEAMS, True),
    "length_penalty": (-5.0, BEAMS, True),
    "prompt_lookup_num_tokens": (2, PLAIN, False),
    "max_matching_ngram_size": (1, {**PLAIN, "prompt_lookup_num_tokens": 2}, False),
    "use_cache": (False, PLAIN, False),
    "cache_implementation": ("static", PLAIN, False),
    "cache_config": ({}, {**PLAIN, "cache_implementation": "static"}, False),
    "max_cache_len": (64, {**PLAIN, "cache_implementation": "static"}, False),
    "prefill_chunk_size": (2, PLAIN, False),
    "disable_compile": (True, PLAIN, False),
    "temperature": (0.1, SAMPLED, True),
    "top_k": (1, SAMPLED, True),
    "top_p": (0.1, SAMPLED, True),
    "min_p": (0.9, SAMPLED, True),
    "top_h": (0.01, SAMPLED, True),
    "typical_p": (0.05, SAMPLED, True),
    "epsilon_cutoff": (0.5, SAMPLED, True),
    "eta_cutoff": (0.9, SAMPLED, True),
    "repetition_penalty": (3.0, PLAIN, True),
    "encoder_repetition_penalty": (3.0, PLAIN, True),
    "no_repeat_ngram_size": (1, PLAIN, True),
    "encoder_no_repeat_ngram_size": (1, PLAIN, True),
    "suppress_tokens": ([13, 51], PLAIN, True),
    "begin_suppress_tokens": ([13, 51], PLAIN, True),
    "bad_words_ids": ([[13], [17], [18, 18]], PLAIN, True),
    "sequence_bias": ([[[20], 40.0]], PLAIN, True),
    "exponential_decay_length_penalty": ((1, 5.0), PLAIN, True),
    "guidance_scale": (3.0, PLAIN, True),
    "renormalize_logits": (True, PLAIN, False),
    "remove_invalid_values": (True, PLAIN, False),
    "watermarking_config": ({"bias": 30.0, "context_width": 1}, PLAIN, True),
    "stop_threshold": (1e-6, PLAIN, True),
}
ELSEWHERE = {"seed", "best_by", "stop_strings", "num_return_sequences", "output_scores"}  # tried in tests of their own


def test_every_field_of_transformers_is_followed_or_refused() -> None:
    """Some were taken, and overwritten or left without a word. A field of a newer version fails here until tried."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= FOLLOWED | set(REFUSED) | SAID
    assert not FOLLOWED & set(REFUSED)
    assert set(TRIED) | ELSEWHERE == FOLLOWED


@pytest.mark.parametrize("field", sorted(TRIED))
def test_what_is_followed_has_its_effect(field: str) -> None:
    model = often_ending(tiny_model(gate=0.5))
    value, beside, matters = TRIED[field]
    one = field == "prompt_lookup_num_tokens" or "prompt_lookup_num_tokens" in beside
    given = [doc(("speech", [5, 6, 7, 8]), ("text", [9, 10, 9, 10])), RAGGED[1]][: 1 if one else 2]

    def written(settings: dict[str, Any]) -> Any:
        torch.manual_seed(0)
        return ids_of(model.generate(given, ["text", "speech"], settings={n: dict(settings) for n in model.names}))

    assert (written({**beside, field: value}) != written(beside)) == matters


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_what_is_not_followed_is_refused(field: str) -> None:
    if field not in known_settings():
        pytest.skip("not in this version of transformers")
    for given in ({field: 7}, _config(field)):
        with pytest.raises(ValueError, match=f"settings for 'text': {field}=7 is not followed: "):
            tiny_model().generate(RAGGED, ["text"], settings={"text": given})
    generation_config("text", {field: None})
    without = GenerationConfig._get_default_generation_params().get(field, False)
    generation_config("text", {field: without})


def _config(field: str) -> GenerationConfig:
    config = GenerationConfig()
    setattr(config, field, 7)
    return config


def test_a_field_that_nobody_has_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a newer transformers may have it."""
    real = GenerationConfig.__init__

    def newer(self: GenerationConfig, **kwargs: Any) -> None:
        real(self, **kwargs)
        self.sideways = kwargs.get("sideways")  # type: ignore[attr-defined]

    monkeypatch.setattr(GenerationConfig, "__init__", newer)
    with pytest.raises(ValueError, match="sideways=3 is not followed: it is new in transformers"):
        generation_config("text", {"sideways": 3})
    generation_config("text", {"sideways": None})


def test_a_config_that_names_the_towers_own_ids() -> None:
    """It was loaded with the backbone: what it says is so anyway."""
    special = Specials(bos=0, eos=1, pad=2)
    model, config = tiny_model(), GenerationConfig(eos_token_id=[1], bos_token_id=0, pad_token_id=2, max_new_tokens=3)
    assert generation_config("text", config, special).max_new_tokens == 3
    model.generate(RAGGED, ["text"], settings={"text": config})
    config.eos_token_id = [1, 7]
    with pytest.raises(ValueError, match=r"eos_token_id=\[1, 7\] is not followed: .* its own \(1\)"):
        model.generate(RAGGED, ["text"], settings={"text": config})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.7}, "temperature=0.7 has no effect without do_sample"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 has no effect without num_beams"),
        ({"max_cache_len": 64}, "max_cache_len=64 has no effect without cache_implementation"),
        ({"max_matching_ngram_size": 3}, "max_matching_ngram_size=3 has no effect without prompt_lookup"),
    ],
)
def test_what_has_no_effect_warns(settings: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=f"settings for 'text': {message}"):
        generation_config("text", settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_lookup_num_tokens": 2, "num_beams": 2}, "prompt_lookup_num_tokens goes with"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged'"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
        (5, "must be a mapping or a GenerationConfig, got int"),
    ],
)
def test_what_cannot_be(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"settings for 'text'.*{message}"):
        generation_config("text", settings)


def test_stop_strings_are_found_by_the_codec() -> None:
    """`generate()` asked for a tokenizer that nobody handed on, and could not have used one this small."""
    codec = TextCodec.train(["three one four one five"] * 4, vocab_size=31)
    model = tiny_model(gate=0.5)
    model.processor = SimpleNamespace(codecs={"text": codec}, encode=copy.deepcopy)  # type: ignore[assignment]
    plain = model.generate(RAGGED, ["text"], settings=limits(model, 12), decode=False)
    words = codec.decode([plain[0][-1].ids[:3]])[0]
    assert len(plain[0][-1].ids) > 3
    settings = {"text": {"max_new_tokens": 12, "stop_strings": [words]}}
    stopped = model.generate(RAGGED[:1], ["text"], settings=settings, decode=False)
    assert stopped[0][-1].ids == plain[0][-1].ids[:3]
    with pytest.raises(ValueError, match="'speech': stop_strings needs a codec of text, and 'speech' has none"):
        model.generate(RAGGED, ["speech"], settings={"speech": settings["text"]}, decode=False)
