"""The judge of pictures: right on pictures that it has not seen, the same after a reload, and no pickle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from zipper_lm.evaluation.classifier import PictureClassifier
from zipper_lm.evaluation.judges import load_judge

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits(start: int, end: int) -> tuple[list[np.ndarray], list[str]]:
    data = load_digits()
    return [(i / 16).astype(np.float64) for i in data.images[start:end]], [WORDS[t] for t in data.target[start:end]]


@pytest.fixture(scope="module")
def judge() -> PictureClassifier:
    return PictureClassifier.fit(*digits(0, 600))


def test_names_pictures_that_it_has_not_seen(judge: PictureClassifier) -> None:
    pictures, words = digits(600, 900)
    assert np.mean([a == b for a, b in zip(judge.transcribe(pictures), words)]) > 0.9
    shuffled = [np.random.default_rng(0).permutation(p.ravel()).reshape(8, 8) for p in pictures]
    assert np.mean([a == b for a, b in zip(judge.transcribe(shuffled), words)]) < 0.4


def test_nothing_and_other_sizes(judge: PictureClassifier) -> None:
    (picture,), (word,) = digits(0, 1)
    assert judge.transcribe([None, np.kron(picture, np.ones((2, 2)))]) == ["", word]
    assert judge.transcribe([]) == []


def test_the_same_after_a_reload_and_no_pickle(judge: PictureClassifier, tmp_path: Path) -> None:
    judge.save_pretrained(tmp_path / "judge")
    assert sorted(f.name for f in (tmp_path / "judge").iterdir()) == ["config.json", "pictures.safetensors"]
    again = load_judge(tmp_path / "judge")
    assert isinstance(again, PictureClassifier)
    pictures, _ = digits(600, 900)
    assert again.transcribe(pictures) == judge.transcribe(pictures)


@pytest.mark.parametrize(
    ("pictures", "captions", "says"),
    [
        ([np.zeros((2, 2))], ["a", "b"], "got 1 and 2"),
        ([np.zeros((2, 2))] * 2, ["a", "?"], r"captions\[1\] holds no words"),
        ([np.zeros((2, 2))] * 2, ["a", "A"], "at least two must differ"),
        ([np.zeros((2, 2))] * 4, ["a", "b", "c", "d"], "4 different ones of 4 pictures"),
    ],
)
def test_what_it_cannot_be_fitted_on(pictures: list[np.ndarray], captions: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PictureClassifier.fit(pictures, captions)


def test_pictures_of_any_size_can_be_fitted_on() -> None:
    """Pictures of several sizes, or large ones, used to be refused after towers had been trained for hours."""
    light, dark = np.full((200, 100), 0.9), np.full((200, 100), 0.1)
    judge = PictureClassifier.fit(
        [light, dark, light[:50], dark, dark[::2]], ["light", "dark", "light", "dark", "dark"]
    )
    assert judge.pictures.shape[1:] == (90, 45)
    assert judge.transcribe([light[:10], dark]) == ["light", "dark"]


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        PictureClassifier.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "recogniser"}')
    (tmp_path / "pictures.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="kind is 'recogniser'"):
        PictureClassifier.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "picture-classifier", "captions": []}')
    with pytest.raises(ValueError, match="does not hold a classifier's pictures"):
        PictureClassifier.from_pretrained(tmp_path)
