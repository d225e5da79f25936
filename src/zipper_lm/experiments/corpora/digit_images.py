"""digit-images: the handwritten digits that ship with scikit-learn (8 x 8 pixels, 17 grey values), named in words.

1797 pictures (Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", its test part); each is
in one split only. Who wrote which is not told there, so that splits share writers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from zipper_lm.experiments.corpora.writing import write_corpus

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = {"test": 300, "validation": 100, "judge": 397}
"""Pictures in each split; the other thousand are for training."""
SEED = 0
BRIGHTEST = 16


def write_digit_images(folder: str | Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write rows ``{"image": file, "text": word}`` in splits train, validation, test and judge.

    Args:
        folder: to be made. overwrite: replace what is there.

    Returns:
        Rows in each split.

    Raises:
        ValueError: as `write_corpus`.
    """
    return write_corpus(
        folder,
        {split: ((picture, {"text": word}) for picture, word in rows) for split, rows in digit_splits().items()},
        "image",
        ".png",
        lambda path, picture: picture.save(path),
        overwrite=overwrite,
    )


def digit_splits() -> dict[str, list[tuple[Image.Image, str]]]:
    """Grey pictures of 8 x 8 pixels with their digits' names, by split."""
    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.images))
    parts = dict(zip([*SIZES, "train"], np.split(order, np.cumsum(list(SIZES.values())))))

    def named(i: int) -> tuple[Image.Image, str]:
        grey = np.round(digits.images[i] * (255 / BRIGHTEST)).astype(np.uint8)
        return Image.fromarray(grey), WORDS[digits.target[i]]

    return {split: [named(i) for i in chosen] for split, chosen in parts.items()}
