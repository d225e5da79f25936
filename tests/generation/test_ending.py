"""Ending by the probability of EOS itself."""

import pytest
import torch
from tiny import doc, limits, tiny_model
from transformers import GenerationConfig

from zipper_lm.generation.ending import StopThreshold

EOS = 1


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


@pytest.mark.parametrize("threshold", [0, -0.5, 1.5])
def test_what_is_no_probability(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"'text': stop_threshold must be in \(0, 1\], got"):
        tiny_model().generate([doc(("speech", [5]))], ["text"], settings={"text": {"stop_threshold": threshold}})
