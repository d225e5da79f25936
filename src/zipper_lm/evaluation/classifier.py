"""A small independent classifier that judges generated pictures: which of its captions fits.

A support vector machine on the pixels (scikit-learn). It is fitted anew from its stored pictures whenever it is loaded,
which takes a second, so that no pickle is ever written or read.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from zipper_lm.codecs.picture import grey, read_picture
from zipper_lm.evaluation.word_error_rate import normalise
from zipper_lm.utils.files import files_into, write_json
from zipper_lm.utils.json_files import read_mapping

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "pictures.safetensors"
KIND = "picture-classifier"
MOST_PIXELS = 4096
FEWEST = 2


class PictureClassifier:
    """Picture -> one of the captions that it was fitted on. Make one with `fit` or `from_pretrained`.

    Args:
        pictures: uint8 ``[pictures, height, width]``, grey.
        labels: index into `captions` of each, int64 ``[pictures]``.
        captions: what there is to choose from, at least two.
    """

    def __init__(self, pictures: np.ndarray, labels: np.ndarray, captions: Sequence[str]) -> None:
        from sklearn.svm import SVC  # as in `zipper_lm.codecs.kmeans`

        self.pictures, self.labels, self.captions = pictures, labels, list(captions)
        self.machine = SVC(gamma="scale", C=10.0).fit(self._features(pictures), labels)

    @classmethod
    def fit(cls, pictures: Sequence[Any], captions: Sequence[str]) -> PictureClassifier:
        """Fit on pictures (whatever `read_picture` reads) and their captions.

        They are seen in grey, in the commonest of their sizes, or smaller if that has more than 4096 pixels.

        Raises:
            ValueError: if a picture cannot be read, a caption is empty, fewer than two captions differ, or so many that
                there are fewer than two pictures of each on average.
        """
        if len(pictures) != len(captions):
            raise ValueError(f"pictures and captions must be as many, got {len(pictures)} and {len(captions)}")
        clean = [normalise(c) for c in captions]
        if "" in clean:
            raise ValueError(f"captions[{clean.index('')}] holds no words: {captions[clean.index('')]!r}")
        names = sorted(set(clean))
        if len(names) < 2:
            raise ValueError(f"captions: at least two must differ, got {names}")
        if len(names) > len(clean) / FEWEST:
            raise ValueError(
                f"captions: {len(names)} different ones of {len(clean)} pictures are too many for a classifier; "
                f"it needs {FEWEST} pictures of each on average"
            )
        read = [grey(read_picture(p)) for p in pictures]
        width, height = Counter(p.size for p in read).most_common(1)[0][0]
        shrink = min(1.0, (MOST_PIXELS / (width * height)) ** 0.5)
        size = (max(1, int(width * shrink)), max(1, int(height * shrink)))
        labels = np.array([names.index(c) for c in clean])
        return cls(np.stack([_fitted(p, size) for p in read]), labels, names)

    def transcribe(self, pictures: Sequence[Any]) -> list[str]:
        """The caption that fits best, of each picture (resized if it has another size); none for `None`.

        Raises:
            ValueError: if a picture cannot be read.
        """
        _, height, width = self.pictures.shape
        there = [i for i, p in enumerate(pictures) if p is not None]
        named = [""] * len(pictures)
        if there:
            seen = [_fitted(grey(read_picture(pictures[i])), (width, height)) for i in there]
            found = self.machine.predict(self._features(np.stack(seen)))
            for i, label in zip(there, found):
                named[i] = self.captions[int(label)]
        return named

    def digest(self) -> str:
        """SHA-256, as hex, of all that decides what it says."""
        digest = hashlib.sha256(json.dumps([self.captions, self.pictures.shape]).encode())
        for array in (self.pictures, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def save_pretrained(self, path: str | Path) -> None:
        """Write `config.json` and `pictures.safetensors` into the folder `path`."""
        with files_into(path, last=CONFIG_FILE) as folder:
            save_file({"pictures": self.pictures, "labels": self.labels}, folder / WEIGHTS_FILE)
            write_json(folder / CONFIG_FILE, {"kind": KIND, "captions": self.captions})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> PictureClassifier:
        """Read what `save_pretrained` wrote, and fit.

        Raises:
            ValueError: if a file is missing, damaged or of another kind.
        """
        config, weights = Path(path) / CONFIG_FILE, Path(path) / WEIGHTS_FILE
        for needed in (config, weights):
            if not needed.is_file():
                raise ValueError(f"picture classifier: no {needed.name} in {path}")
        fields = read_mapping(config)
        if fields.get("kind") != KIND:
            raise ValueError(f"{config}: kind is {fields.get('kind')!r}, not {KIND!r}")
        try:
            tensors = load_file(weights)
            return cls(tensors["pictures"], tensors["labels"], fields["captions"])
        except (KeyError, TypeError, SafetensorError) as error:
            raise ValueError(f"picture classifier: {path} does not hold a classifier's pictures: {error}") from error

    @staticmethod
    def _features(pictures: np.ndarray) -> np.ndarray:
        return pictures.reshape(len(pictures), -1).astype(np.float32) / 255


def _fitted(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """uint8 ``[height, width]`` of a grey picture, brought to ``size`` (width, height)."""
    return np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BOX))
