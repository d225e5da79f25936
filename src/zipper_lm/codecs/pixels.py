"""Pixel codec: a small grey picture as its pixels, row by row; nothing to fit, nothing to download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from zipper_lm.codecs.codec import CODEC_FILE, read_codec_file
from zipper_lm.codecs.picture import grey, read_picture
from zipper_lm.utils.files import files_into, write_json


@dataclass(frozen=True, kw_only=True)
class PixelCodecConfig:
    """Size of the pictures.

    Args:
        height, width: pixels; a picture has ``height * width`` tokens.
        levels: grey levels, evenly spaced from black to white, 2 to 256.
    """

    height: int = 8
    width: int = 8
    levels: int = 16

    def __post_init__(self) -> None:
        for name, least, most in (("height", 1, 256), ("width", 1, 256), ("levels", 2, 256)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"pixel codec: {name} must be a whole number from {least} to {most}, got {value!r}")


class PixelCodec:
    """Grey pictures <-> ids: the level of each pixel, from the top left, row by row.

    Pictures of another size are resized, of another mode turned to grey (see `zipper_lm.codecs.picture.grey`).

    Args:
        config: sizes.
    """

    kind: ClassVar[str] = "pixels"

    def __init__(self, config: PixelCodecConfig | None = None) -> None:
        self.config = config or PixelCodecConfig()

    @classmethod
    def make(
        cls,
        values: Sequence[Any] = (),
        *,
        source: str | None = None,
        revision: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> PixelCodec:
        """As a recipe asks for it: nothing is fitted, `options` are those of `PixelCodecConfig`."""
        if source is not None:
            raise ValueError(
                f"codec.source: {source} holds no codec.json, and a codec of pixels is made of nothing else"
            )
        return cls(PixelCodecConfig(**options))

    @property
    def vocab_size(self) -> int:
        """Levels and the three special ids."""
        return self.config.levels + 3

    @property
    def bos_id(self) -> int:
        """First id after the levels."""
        return self.config.levels

    @property
    def eos_id(self) -> int:
        """Second id after the levels."""
        return self.config.levels + 1

    @property
    def pad_id(self) -> int:
        """Third id after the levels."""
        return self.config.levels + 2

    @property
    def rate(self) -> None:
        """`None`: a picture has no time."""
        return None

    def encode(self, values: Sequence[Any]) -> list[list[int]]:
        """Pictures (whatever `read_picture` reads) to levels, ``height * width`` each.

        Raises:
            ValueError: if a picture cannot be read.
        """
        rows = []
        for value in values:
            picture = grey(read_picture(value))
            if picture.size != (self.config.width, self.config.height):
                picture = picture.resize((self.config.width, self.config.height), Image.Resampling.BOX)
            levels = np.round(np.asarray(picture, dtype=np.float32) / 255 * (self.config.levels - 1))
            rows.append(levels.astype(int).ravel().tolist())
        return rows

    def decode(self, ids: Sequence[Sequence[int]]) -> list[Image.Image]:
        """Levels to grey pictures of the codec's size. What a row lacks is black, what it has too much is dropped.

        Raises:
            ValueError: if an id is not in ``[0, levels)``, special ids included.
        """
        pictures = []
        for number, row in enumerate(ids):
            levels = np.zeros(self.config.height * self.config.width, dtype=np.int64)
            given = np.asarray(list(row)[: len(levels)], dtype=np.int64)
            if len(given) and not (given.min() >= 0 and given.max() < self.config.levels):
                raise ValueError(f"pixel ids, row {number}: an id is not in [0, {self.config.levels})")
            levels[: len(given)] = given
            shades = np.round(levels * 255 / (self.config.levels - 1)).astype(np.uint8)
            pictures.append(Image.fromarray(shades.reshape(self.config.height, self.config.width)))
        return pictures

    def save_pretrained(self, path: str | Path) -> None:
        """Write `codec.json` into the folder `path`."""
        with files_into(path, last=CODEC_FILE) as folder:
            write_json(folder / CODEC_FILE, {"kind": self.kind, **asdict(self.config)})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> PixelCodec:
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: if the file is missing, of another kind, or does not say what a pixel codec is.
        """
        try:
            return cls(PixelCodecConfig(**read_codec_file(path, cls.kind)))
        except TypeError as error:
            raise ValueError(f"{Path(path) / CODEC_FILE}: {error}") from error
