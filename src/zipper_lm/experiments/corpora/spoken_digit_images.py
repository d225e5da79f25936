"""spoken-digit-images: each recording of a single digit beside a handwritten picture of the same digit, and its name.

Three modalities in every row, so that towers of all three can be fused at once, and documents of several turns made.
The recordings are the user's: a word (zero to nine) a file, such as those of the Free Spoken Digit Dataset.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zipper_lm.data.sources.readers import read_rows
from zipper_lm.experiments.corpora.digit_images import WORDS, digit_splits
from zipper_lm.experiments.corpora.writing import write_corpus
from zipper_lm.utils.files import check_apart

SEED = 0
CLIPS = {"train": "train", "validation": "validation", "test": "test", "judge": "train"}
"""Split of the pictures to split of the recordings: those of the judge's pictures are again those of training."""


def write_spoken_digit_images(folder: str | Path, source: str | Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write rows ``{"image": file, "speech": file, "text": word}`` in splits train, validation, test and judge.

    A recording is in one row; a picture is in several where there are more recordings than pictures of its digit.

    Args:
        folder: to be made.
        source: data set of recordings with splits train, validation and test; each one's text is a digit's name.
        overwrite: replace what is there.

    Returns:
        Rows in each split.

    Raises:
        ValueError: if a text is no digit's name, or a recording no file; and as `read_rows` and `write_corpus`.
    """
    pictures = digit_splits()
    clips = {split: list(read_rows(str(source), split=name)) for split, name in CLIPS.items()}
    for split, rows in clips.items():
        for number, row in enumerate(rows):
            if row.get("text") not in WORDS:
                raise ValueError(f"{source}: row {number} of {split} says {row.get('text')!r}, not a digit's name")
            if not isinstance(row.get("speech"), (str, Path)):
                raise ValueError(f"{source}: row {number} of {split} has no file with sound")

    def beside(split: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        draw = np.random.default_rng((SEED, list(CLIPS).index(split)))
        shown: dict[str, list[Image.Image]] = {}
        for picture, word in pictures[split]:
            shown.setdefault(word, []).append(picture)
        for number, row in enumerate(clips[split]):
            same, sound = shown[row["text"]], Path(row["speech"])
            name = f"{split}/{number:05d}{sound.suffix}"
            yield (same[draw.integers(len(same))], sound), {"speech": name, "text": row["text"]}

    def write(path: Path, value: tuple[Image.Image, Path]) -> None:
        picture, sound = value
        picture.save(path)
        shutil.copyfile(sound, path.with_suffix(sound.suffix))

    check_apart(folder, {"--source": source})
    return write_corpus(folder, {s: beside(s) for s in CLIPS}, "image", ".png", write, overwrite=overwrite)
