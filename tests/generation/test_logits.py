"""Guided writing against the same written out, without caches."""

import pytest
from tiny import doc, ids_of, limits, naive_greedy, often_ending, tiny_model

RAGGED = [doc(("speech", [5, 6, 7, 8])), doc(("text", [5, 6]), ("speech", [9]))]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "lfm2"])
def test_guided_greedy(family: str) -> None:
    model = often_ending(tiny_model(gate=0.5, kinds={"text": family}))
    settings = {n: {**given, "guidance_scale": 2.5} for n, given in limits(model, 8).items()}
    written = ids_of(model.generate(RAGGED, ["text", "speech"], settings=settings))
    assert written == naive_greedy(model, RAGGED, ["text", "speech"], 8, guidance=2.5)
    assert written != ids_of(model.generate(RAGGED, ["text", "speech"], settings=limits(model, 8)))


def test_a_scale_of_one_changes_nothing() -> None:
    model = tiny_model(gate=0.5)
    plain = model.generate(RAGGED, ["text"], settings=limits(model, 6))
    settings = {n: {**given, "guidance_scale": 1.0} for n, given in limits(model, 6).items()}
    assert ids_of(model.generate(RAGGED, ["text"], settings=settings)) == ids_of(plain)


def test_settings_are_not_changed_and_sampling_works() -> None:
    model = tiny_model(gate=0.5)
    settings = {"text": {"guidance_scale": 3.0, "do_sample": True, "max_new_tokens": 5}}
    assert len(model.generate(RAGGED, ["text"], settings=settings)) == 2
    assert settings["text"]["guidance_scale"] == 3.0


@pytest.mark.parametrize("other", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_what_guidance_does_not_go_with(other: dict[str, int]) -> None:
    model = tiny_model(gate=0.5)
    with pytest.raises(ValueError, match=r"'text': guidance_scale=2\.0 goes with greedy search and sampling only"):
        model.generate(RAGGED[:1], ["text"], settings={"text": {"guidance_scale": 2.0, **other}})
