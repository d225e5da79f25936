"""What a projection keeps of features, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zipper_lm.codecs.kmeans import fit_centroids, nearest
from zipper_lm.codecs.spelling_projection import (
    SpellingProjection,
    SpellingProjectionConfig,
    fit_spelling_projection,
)

LETTERS, EACH, POOL, WIDTH = "abcd", 4, 2, 12


def said(count: int) -> tuple[list[Tensor], list[str], list[Tensor]]:
    """Features of sounds, 50 a second, their texts, and the letter of each unit: letters are little in them, who
    speaks and how is much."""
    drawn = torch.Generator().manual_seed(0)
    codes = torch.randn(len(LETTERS), WIDTH, generator=drawn)
    found, texts, owners = [], [], []
    for _ in range(count):
        letters = torch.randint(len(LETTERS), (6,), generator=drawn)
        speaker = 4 * torch.randn(1, WIDTH, generator=drawn)
        held = letters.repeat_interleave(EACH)
        found.append(codes[held] + speaker + 0.1 * torch.randn(len(held), WIDTH, generator=drawn))
        texts.append("".join(LETTERS[i] for i in letters))
        owners.append(held[::POOL])
    return found, texts, owners


def purity(vectors: list[Tensor], owners: list[Tensor]) -> float:
    """Share of units' places whose letter is the commonest one of their unit."""
    together, letters = torch.cat(vectors), torch.cat(owners)
    ids = nearest(together, fit_centroids(together, 16, 0))
    counts = torch.zeros(16, len(LETTERS)).index_put_((ids, letters), torch.ones(len(ids)), accumulate=True)
    return float(counts.max(1).values.sum() / len(ids))


def test_units_of_a_projection_tell_letters_where_speakers_drown_them() -> None:
    """K-means of the last layer of Whisper tiny.en lost most of what is said: it keeps what varies most."""
    features, texts, owners = said(64)
    before = torch.get_rng_state()
    projection = fit_spelling_projection(features, [*texts[:-1], None], POOL, 25, steps=60)
    assert torch.equal(before, torch.get_rng_state())
    found = [projection.units(row) for row in features]
    assert [row.shape for row in found] == [(len(row) // POOL, projection.config.size) for row in features]
    plain = purity([row.unflatten(0, (-1, POOL)).mean(1) for row in features], owners)
    assert purity(found, owners) > 0.65 > 0.5 > plain


def test_a_sound_in_a_batch_is_as_alone() -> None:
    """Of a shorter one zeros lie behind it, which a norm with a bias would make something of."""
    features, texts, _ = said(8)
    projection = fit_spelling_projection(features, texts, POOL, 25, steps=2)
    short = features[0][: len(features[0]) // 2]
    batch = torch.nn.utils.rnn.pad_sequence([features[1], short], batch_first=True)
    with torch.no_grad():
        together = projection(batch)[1, : len(short) // POOL]
    torch.testing.assert_close(together, projection.units(short))


def test_a_seed_makes_the_same_again() -> None:
    features, texts, _ = said(40)
    one, same, other = (
        fit_spelling_projection(features, texts, POOL, 25, steps=3, seed=s).out.weight for s in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("texts", [[None] * 4, ["", None, "", ""], ["abcd" * 30] * 4])
def test_without_a_text_that_fits_there_is_nothing_to_learn(texts: list[str | None]) -> None:
    with pytest.raises(ValueError, match=r"spelling_steps=2 needs sounds with texts .* time for; of 4 sounds"):
        fit_spelling_projection(said(4)[0], texts, POOL, 25, steps=2)


def test_a_folder_of_it_is_read_again_and_damage_is_told(tmp_path: Path) -> None:
    features, texts, _ = said(8)
    projection = fit_spelling_projection(features, texts, POOL, 25, steps=2)
    at = tmp_path / "projection"
    projection.save(at)
    again = SpellingProjection.load(at, features=WIDTH, pool=POOL)
    assert torch.equal(again.units(features[0]), projection.units(features[0]))
    with pytest.raises(ValueError, match="pool=2, but the codec has 4: it is another codec's"):
        SpellingProjection.load(at, features=WIDTH, pool=4)
    with pytest.raises(ValueError, match="features=12, but the codec has 16"):
        SpellingProjection.load(at, features=16, pool=POOL)
    weights = at / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "out.bias"}, weights)
    with pytest.raises(ValueError, match=r"out\.bias"):
        SpellingProjection.load(at, features=WIDTH, pool=POOL)
    config = at / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "kernel": 4}))
    with pytest.raises(ValueError, match="kernel must be odd, got 4"):
        SpellingProjection.load(at, features=WIDTH, pool=POOL)


def test_sounds_that_are_too_long_are_not_learned_from() -> None:
    """Thirty-two of an hour each, side by side, would take all memory there is."""
    features, texts, _ = said(2)
    hour = features[0].repeat(70, 1)
    with pytest.raises(ValueError, match=r"of 1 sounds 1 have texts, 0 of these last at most 30 s"):
        fit_spelling_projection([hour], texts[:1], POOL, 25, steps=1)
    alone = fit_spelling_projection(features[1:], texts[1:], POOL, 25, steps=2)
    beside = fit_spelling_projection([hour, features[1]], texts, POOL, 25, steps=2)
    assert torch.equal(alone.out.weight, beside.out.weight)


def test_features_that_are_no_numbers_are_told_at_once() -> None:
    """They made every weight of it NaN, and k-means said so after all the training."""
    features, texts, _ = said(2)
    features[1][3, 2] = torch.inf
    with pytest.raises(ValueError, match="spelling_steps=9: the loss is nan at step 1"):
        fit_spelling_projection(features, texts, POOL, 25, steps=9)


@pytest.mark.parametrize("value", [0, True, 2.5, "8"])
def test_sizes_are_whole_numbers(value: object) -> None:
    with pytest.raises(ValueError, match="size must be a whole number of at least 1"):
        SpellingProjectionConfig(features=4, size=value)  # type: ignore[arg-type]
