"""Draws from a seed: the right shares, the same anywhere, and none like another."""

import pytest
import torch
from tiny import doc, tiny_model
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from zipper_lm.generation.sampling import SEEDS, Draw, gumbel, keep_likely, stream_key
from zipper_lm.generation.settings import generation_config

DRAWS = 50_000
SHARES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])


@pytest.mark.parametrize("numbers", ["seeds", "places", "large seeds"])
def test_shares(numbers: str) -> None:
    """Whichever number tells the draws apart. Five standard deviations of a share of one half are 0.011."""
    count, same = torch.arange(DRAWS), torch.full((DRAWS,), 5)
    keys = {
        "seeds": lambda: stream_key(count, same),
        "places": lambda: stream_key(same, count),
        "large seeds": lambda: stream_key(SEEDS - 1 - count * 2**32, same),
    }[numbers]()
    chosen = (SHARES.log() + gumbel(keys, 5)).argmax(-1)
    torch.testing.assert_close(chosen.bincount(minlength=5) / DRAWS, SHARES, atol=0.011, rtol=0)


def test_noise() -> None:
    """Gumbel's mean and variance; ids and neighbours are not alike."""
    noise = gumbel(stream_key(torch.arange(20_000)), 30)
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 6, abs=0.02)
    between = torch.cat([torch.corrcoef(noise.T), torch.corrcoef(torch.cat([noise[1:].T, noise[:-1].T]))[:30, 30:]])
    assert float(between.masked_fill(between > 0.99, 0).abs().max()) < 0.04


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(5, 1.0, 0.0), (40, 0.8, 0.0), (40, 1.0, 0.1), (10, 0.7, 0.05)])
def test_what_is_too_unlikely_is_what_transformers_says(top_k: int, top_p: float, min_p: float) -> None:
    scores = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)) * 2
    theirs = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, scores))
    theirs = MinPLogitsWarper(min_p)(None, theirs) if min_p else theirs
    like = torch.ones(300)
    ours = keep_likely(scores, (like * top_k).long(), like * top_p, like * min_p)
    assert torch.equal(ours, theirs)


def test_the_likeliest_always_stays() -> None:
    scores = torch.tensor([[1.0, 5.0, 1.0]])
    kept = keep_likely(scores, torch.tensor([1]), torch.tensor([0.0]), torch.tensor([1.0]))
    assert kept.isfinite().tolist() == [[False, True, False]]


def test_what_is_not_given_is_what_transformers_takes() -> None:
    assert Draw.of(generation_config("text", {"do_sample": True})).top_k == 50
    assert Draw.of(generation_config("text", {"do_sample": True, "top_k": 0})) == Draw()


@pytest.mark.parametrize("seed", [-1, 2**62, 1.5, True, "7"])
def test_seeds_out_of_range(seed: object) -> None:
    with pytest.raises(ValueError, match="'text': seed must be a whole number"):
        generation_config("text", {"do_sample": True, "seed": seed})


@pytest.mark.parametrize(
    ("other", "said"),
    [({"num_beams": 2}, "num_beams=2"), ({"typical_p": 0.5}, "typical_p=0.5"), ({"eta_cutoff": 0.1}, "eta_cutoff=0.1")],
)
def test_what_draws_otherwise_is_refused_beside_a_seed(other: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        generation_config("text", {"do_sample": True, "seed": 1, **other})


def test_a_seed_without_sampling_is_said() -> None:
    with pytest.warns(UserWarning, match="seed=1 has no effect without do_sample"):
        generation_config("text", {"seed": 1})


def test_global_random_numbers_do_not_matter() -> None:
    model = tiny_model(2, gate=1.0)
    how = {"text": {"do_sample": True, "seed": 4, "max_new_tokens": 8}}
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(model.generate([doc(("speech", [5, 6, 7]))], ["text"], settings=how)[0][-1].ids)
    assert found[0] == found[1]
