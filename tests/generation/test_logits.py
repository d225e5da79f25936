"""Guided writing against the same written out, without caches; ending by the probability of EOS itself."""

import pytest
import torch
from tiny import doc, ids_of, limits, naive_greedy, often_ending, tiny_model
from transformers import GenerationConfig

from zipper_lm.generation.logits import StopThreshold, Suppression

EOS = 1
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


def test_eos_where_it_is_likely_enough_and_nowhere_else() -> None:
    """The first row's EOS is its likeliest single token, with 0.3: the race alone would end there."""
    scores = torch.tensor([[0.2, 0.3, 0.25, 0.25], [0.1, 0.6, 0.2, 0.1]]).log()
    goes_on, ends = StopThreshold(0.5, EOS)(torch.zeros(2, 3), scores)
    assert goes_on[EOS] == -torch.inf
    assert torch.equal(goes_on[[0, 2, 3]], scores[0, [0, 2, 3]])
    assert ends.isneginf().tolist() == [True, False, True, True]


def test_a_low_threshold_ends_early_and_a_high_one_late() -> None:
    model, given = tiny_model(gate=0.5), [doc(("speech", [5, 6, 7, 8]))]

    def written(**more: object) -> int:
        settings = limits(model, 20, **more)  # type: ignore[arg-type]
        return len(model.generate(given, ["text"], settings=settings)[0][-1].ids or [])

    assert written(stop_threshold=1e-6) == 0
    assert written(stop_threshold=1.0) == 20
    assert written(stop_threshold=1e-6, min_new_tokens=4) == 4


def test_as_a_field_of_a_generation_config() -> None:
    model, config = tiny_model(gate=0.5), GenerationConfig(max_new_tokens=9, do_sample=False)
    config.stop_threshold = 1e-6
    assert model.generate([doc(("speech", [5]))], ["text"], settings={"text": config})[0][-1].ids == []


def test_suppression_leaves_all_others_as_they_are() -> None:
    scores = torch.randn(2, 7)
    before = scores.clone()
    made = Suppression([5, 0], scores.device)(torch.zeros(2, 1, dtype=torch.long), scores)
    assert made[:, [0, 5]].eq(float("-inf")).all()
    assert torch.equal(made[:, [1, 2, 3, 4, 6]], before[:, [1, 2, 3, 4, 6]])
    assert torch.equal(Suppression([], scores.device)(torch.zeros(2, 1, dtype=torch.long), before.clone()), before)
