"""What settings may say, and that nobody else says it."""

import pytest
from tiny import doc, ids_of, tiny_model
from transformers import GenerationConfig

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
        ({"max_new_tokens": "abc"}, "max_new_tokens must be a number, got 'abc'"),
        ({"do_sample": "False"}, "do_sample must be true or false, got 'False'"),
        ({"num_beams": "2x"}, "num_beams must be a number"),
        ({"stop_threshold": "half"}, "stop_threshold must be a number"),
        ({"guidance_scale": "much"}, "guidance_scale must be a number"),
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
