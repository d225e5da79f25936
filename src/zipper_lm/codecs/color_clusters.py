"""Colour clusters: each pixel of a small picture is the nearest of a few hundred colours, as ImageGPT reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save
from scipy.spatial.distance import cdist

from zipper_lm.codecs.codec import CODEC_FILE, read_codec_file
from zipper_lm.codecs.layout import IdLayout, LaidOut
from zipper_lm.codecs.picture import read_picture, rgb
from zipper_lm.utils.files import files_into, write_json
from zipper_lm.utils.hub import check_hub_arguments, reaching

COLORS_FILE = "colors.safetensors"
PICTURES_TO_FIT, PIXELS_TO_FIT = 2000, 200_000
"""How much clusters are fitted on at most; of more, so many are drawn."""


@dataclass(frozen=True, kw_only=True)
class PictureSize:
    """How pictures are brought to one size.

    Args:
        height, width: pixels; a picture has ``height * width`` tokens.
        resample: filter, as Pillow's `Image.Resampling`; 2 is bilinear.
    """

    height: int = 32
    width: int = 32
    resample: int = Image.Resampling.BILINEAR

    def __post_init__(self) -> None:
        for name, least, most in (("height", 1, 512), ("width", 1, 512), ("resample", 0, 5)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(
                    f"colour clusters: {name} must be a whole number from {least} to {most}, got {value!r}"
                )
        object.__setattr__(self, "resample", int(self.resample))


class ColorClusters(LaidOut):
    """Colour pictures <-> ids: the nearest cluster of each pixel, from the top left, row by row.

    Chen et al. 2020, "Generative Pretraining from Pixels", section 3: 512 clusters of RGB values. Make one with `make`.

    Args:
        colors: float32 ``[clusters, 3]``, red, green and blue from -1 to 1: ImageGPT's own normalisation.
        size: of the pictures.
        layout: where the clusters lie among the tower's ids; by default they come first, then BOS, EOS and PAD.

    Raises:
        ValueError: if `colors` has another shape, or `layout` another number of units.
    """

    kind: ClassVar[str] = "color-clusters"

    def __init__(self, colors: np.ndarray, size: PictureSize | None = None, layout: IdLayout | None = None) -> None:
        if colors.ndim != 2 or colors.shape[1] != 3 or not len(colors) or not np.isfinite(colors).all():
            raise ValueError(f"colour clusters: expected finite [clusters, 3], got {colors.shape}")
        self.colors, self.size = colors.astype(np.float32), size or PictureSize()
        self.layout = layout or IdLayout(units=len(colors))
        if self.layout.units != len(colors):
            raise ValueError(f"colour clusters: {len(colors)} clusters, but the layout has {self.layout.units}")

    @classmethod
    def make(
        cls,
        values: Sequence[Any] = (),
        *,
        source: str | None = None,
        revision: str | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        clusters: int | None = None,
        offset: int = 0,
        bos: int | None = None,
        eos: int | None = None,
        pad: int | None = None,
        **hub: Any,
    ) -> ColorClusters:
        """As a recipe asks for it: the clusters of an ImageGPT, or clusters fitted on pictures.

        Args:
            values: pictures to fit on, where there is no source.
            source, revision: folder or Hub id of an `ImageGPTImageProcessor`, such as ``openai/imagegpt-small``.
            seed: of the fit.
            height, width: of the pictures; by default those of the source, else 32. clusters: to fit (256).
            offset, bos, eos, pad: of `IdLayout`. ImageGPT has one special id, 512, for all three.
            hub: `cache_dir`, `token`, `local_files_only`.

        Raises:
            ValueError: if the source cannot be loaded or has no clusters, or there are fewer colours than clusters.
        """
        check_hub_arguments(hub)
        given = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
        if source is None:
            size = PictureSize(**given)
            colors = _fitted(values, size, 256 if clusters is None else clusters, seed)
        else:
            if clusters is not None:
                raise ValueError(f"colour clusters: clusters={clusters} has no effect, those of {source} are taken")
            colors, read = _of_imagegpt(source, revision, **hub)
            size = PictureSize(**{**read, **given})
        return cls(colors, size, IdLayout(units=len(colors), offset=offset, bos=bos, eos=eos, pad=pad))

    @property
    def unit_vectors(self) -> tuple[range, torch.Tensor]:
        """Ids of the clusters, and their colours, float32 [clusters, 3]."""
        return self.layout.content, torch.from_numpy(self.colors)

    @property
    def rate(self) -> None:
        """`None`: a picture has no time."""
        return None

    def encode(self, values: Sequence[Any]) -> list[list[int]]:
        """Pictures (whatever `read_picture` reads) to ids, ``height * width`` each.

        Raises:
            ValueError: if a picture cannot be read.
        """
        nearest = (cdist(_pixels(value, self.size), self.colors, "sqeuclidean").argmin(1) for value in values)
        return [self.layout.to_ids(row.tolist()) for row in nearest]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[Image.Image]:
        """Ids to RGB pictures of the codec's size. What a row lacks is black, what it has too much is dropped.

        Raises:
            ValueError: if an id is no cluster's, special ids included.
        """
        count = self.size.height * self.size.width
        shades = np.clip(np.round((self.colors + 1) * 127.5), 0, 255).astype(np.uint8)
        pictures = []
        for number, row in enumerate(ids):
            units = self.layout.to_units(row[:count], f"colour ids, row {number}")
            pixels = np.zeros((count, 3), dtype=np.uint8)
            pixels[: len(units)] = shades[units]
            pictures.append(Image.fromarray(pixels.reshape(self.size.height, self.size.width, 3)))
        return pictures

    def save_pretrained(self, path: str | Path) -> None:
        """Write `codec.json` and `colors.safetensors` into the folder `path`."""
        with files_into(path, last=CODEC_FILE) as folder:
            # Not save_file: it makes files that only their owner can read.
            (folder / COLORS_FILE).write_bytes(save({"colors": self.colors}))
            said = {"kind": self.kind, "size": asdict(self.size), "layout": self.layout.settings()}
            write_json(folder / CODEC_FILE, said)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ColorClusters:
        """Read what `save_pretrained` wrote.

        Raises:
            ValueError: if a file is missing, of another kind, or does not say what colour clusters are.
        """
        said, file = read_codec_file(path, cls.kind), Path(path) / COLORS_FILE
        if not file.is_file():
            raise ValueError(f"{cls.kind} codec: no {COLORS_FILE} in {path}")
        try:
            colors = load_file(file)["colors"]
            return cls(colors, PictureSize(**said["size"]), IdLayout(units=len(colors), **said["layout"]))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: {CODEC_FILE} says no colour clusters ({error})") from error


def _of_imagegpt(source: str, revision: str | None, **hub: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Clusters, float32 ``[clusters, 3]``, and picture size of an image processor."""
    from transformers import ImageGPTImageProcessor

    with reaching("colour clusters", source, revision):
        processor = ImageGPTImageProcessor.from_pretrained(source, revision=revision or "main", **hub)
    if processor.clusters is None:
        raise ValueError(f"colour clusters {source!r}: its image processor has no clusters")
    if set(np.ravel([processor.image_mean, processor.image_std])) != {0.5}:
        raise ValueError(
            f"colour clusters {source!r}: expected the normalisation to [-1, 1] (image_mean and image_std 0.5), got "
            f"{processor.image_mean} and {processor.image_std}"
        )
    size = {"height": processor.size["height"], "width": processor.size["width"], "resample": int(processor.resample)}
    return np.asarray(processor.clusters, dtype=np.float32), size


def _pixels(value: Any, size: PictureSize) -> np.ndarray:
    """A picture's pixels, float32 ``[height * width, 3]`` from -1 to 1."""
    picture = rgb(read_picture(value), (size.width, size.height), size.resample)
    return np.asarray(picture, dtype=np.float32).reshape(-1, 3) / 127.5 - 1


def _fitted(values: Sequence[Any], size: PictureSize, clusters: int, seed: int) -> np.ndarray:
    """Centres of clusters of the pictures' pixels, float32 ``[clusters, 3]``."""
    from sklearn.cluster import MiniBatchKMeans  # as in `kmeans`

    if isinstance(clusters, bool) or not isinstance(clusters, int) or clusters < 2:
        raise ValueError(f"colour clusters: clusters must be a whole number of at least 2, got {clusters!r}")
    if not len(values):
        raise ValueError("colour clusters: neither a source nor pictures to fit on")
    draw = np.random.default_rng(seed)
    chosen = [values[i] for i in draw.permutation(len(values))[:PICTURES_TO_FIT]]
    each = PIXELS_TO_FIT // len(chosen)
    pixels = np.concatenate([draw.permutation(_pixels(value, size))[:each] for value in chosen])
    if (colors := len(np.unique(pixels, axis=0))) < clusters:
        raise ValueError(f"colour clusters: {clusters} asked for, but the pictures have only {colors} colours")
    return MiniBatchKMeans(clusters, random_state=seed).fit(pixels).cluster_centers_.astype(np.float32)
