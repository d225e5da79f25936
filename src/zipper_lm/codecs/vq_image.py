"""VQ image codec: a picture as the codes of a pre-trained vector-quantised autoencoder of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, Emu3VQVAE, ImageProcessingMixin, JanusVQVAE

from zipper_lm.codecs.codec import CODEC_FILE, read_codec_file
from zipper_lm.codecs.layout import IdLayout, LaidOut
from zipper_lm.codecs.picture import read_picture, rgb
from zipper_lm.codecs.pretrained import ModelSource, RunsModel, keep_model, kept_model, open_model
from zipper_lm.utils.files import files_into, write_json
from zipper_lm.utils.hub import check_hub_arguments, reaching

VqModel = JanusVQVAE | Emu3VQVAE
PREFIX = r"^(?:model\.)?vqmodel\."
"""Names of the autoencoder's weights in a checkpoint of the whole model begin so."""
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class PictureForm:
    """What the autoencoder sees of a picture.

    Args:
        height, width: pixels; pictures of another size are resized, and their sides' ratio is not kept.
        mean, std: red, green and blue, from 0 to 1, are brought to ``(value - mean) / std``.
        resample: filter, as Pillow's `Image.Resampling`; 3 is bicubic.
    """

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = tuple(getattr(self, name))
            if len(value) != 3 or not np.isfinite(value).all() or (name == "std" and min(value) <= 0):
                raise ValueError(f"vq-image codec: {name} must be three numbers (std above 0), got {value}")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "resample", int(self.resample))


class VqImageCodec(LaidOut, RunsModel):
    """Pictures <-> codes of a `JanusVQVAE` or an `Emu3VQVAE`, from the top left, row by row.

    Args:
        model: the autoencoder.
        at: where it is (`zipper_lm.codecs.pretrained.open_model`).
        form: what it sees.
        layout: where its codes lie among the tower's ids; by default they come first, then BOS, EOS and PAD.

    Raises:
        ValueError: if the model cannot take pictures of that size, or `layout` has another number of units.
    """

    kind: ClassVar[str] = "vq-image"

    def __init__(self, model: VqModel, at: ModelSource, form: PictureForm, layout: IdLayout | None = None) -> None:
        codes = model.quantize.embedding.num_embeddings
        self.model, self.at, self.form, self.layout = model, at, form, layout or IdLayout(units=codes)
        if self.layout.units != codes:
            raise ValueError(f"vq-image codec: the model has {codes} codes, but the layout has {self.layout.units}")
        step, fixed = _step(model), _fixed_size(model)
        for name, value in (("height", form.height), ("width", form.width)):
            if isinstance(value, bool) or not isinstance(value, int) or value < step or value % step:
                raise ValueError(f"vq-image codec: {name} must be a multiple of {step} pixels, got {value!r}")
            if fixed not in (None, value):
                raise ValueError(
                    f"vq-image codec: {name} must be {fixed} pixels, this model takes no other; got {value}"
                )
        self.grid = (form.height // step, form.width // step)

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
        offset: int = 0,
        bos: int | None = None,
        eos: int | None = None,
        pad: int | None = None,
        **hub: Any,
    ) -> VqImageCodec:
        """As a recipe asks for it.

        Args:
            source, revision: folder or Hub id of the autoencoder with its image processor, or of a whole Janus or Emu3
                that has it inside, such as ``deepseek-community/Janus-Pro-1B``.
            height, width: of the pictures; Janus has one size, for Emu3 they must be given.
            offset, bos, eos, pad: of `IdLayout`. hub: `cache_dir`, `token`, `local_files_only`.

        Raises:
            ValueError: if the source cannot be loaded, is of another family, or has no image processor; or on a size
                that the model does not take.
        """
        if source is None:
            raise ValueError("vq-image codec: it needs a source, the folder or Hub id of a pre-trained model")
        check_hub_arguments(hub)
        model, at = open_model(VqImageModel, ModelSource(source=source, revision=revision, hub=hub))
        height, width = (_fixed_size(model) if given is None else given for given in (height, width))
        if height is None or width is None:
            raise ValueError(f"vq-image codec: {source} takes pictures of many sizes; give height and width")
        with reaching("image processor", source, revision):
            said = _said_of_pictures(source, revision=revision or "main", **hub)
        form = PictureForm(
            height=height,
            width=width,
            mean=said["image_mean"],
            std=said["image_std"],
            resample=said["resample"],
        )
        return cls(
            model,
            at,
            form,
            IdLayout(units=model.quantize.embedding.num_embeddings, offset=offset, bos=bos, eos=eos, pad=pad),
        )

    @property
    def unit_vectors(self) -> tuple[range, torch.Tensor]:
        """Ids of the codes, and their vectors, float32 [codes, width]."""
        return self.layout.content, self.model.quantize.embedding.weight.detach().float().cpu()

    @property
    def rate(self) -> None:
        """`None`: a picture has no time."""
        return None

    @torch.no_grad()
    def encode(self, values: Sequence[Any]) -> list[list[int]]:
        """Pictures (whatever `read_picture` reads) to ids, as many for each as the model's grid has places.

        Raises:
            ValueError: if a picture cannot be read.
        """
        rows: list[list[int]] = []
        for start in range(0, len(values), BATCH):
            pixels = torch.stack([self._pixels(value) for value in values[start : start + BATCH]])
            rows += [self.layout.to_ids(units) for units in _encoded(self.model, pixels).tolist()]
        return rows

    @torch.no_grad()
    def decode(self, ids: Sequence[Sequence[int]]) -> list[Image.Image]:
        """Ids to RGB pictures of the codec's size. What a row lacks is code 0, what it has too much is dropped.

        Raises:
            ValueError: if an id is no code's, special ids included.
        """
        count = self.grid[0] * self.grid[1]
        rows = [self.layout.to_units(row[:count], f"image ids, row {number}") for number, row in enumerate(ids)]
        pictures: list[Image.Image] = []
        for start in range(0, len(rows), BATCH):
            units = torch.tensor([row + [0] * (count - len(row)) for row in rows[start : start + BATCH]])
            pixels = _decoded(self.model, units.view(-1, *self.grid)).permute(0, 2, 3, 1).cpu().numpy()
            shades = np.clip(np.round((pixels * self.form.std + self.form.mean) * 255), 0, 255).astype(np.uint8)
            pictures += [Image.fromarray(picture) for picture in shades]
        return pictures

    def save_pretrained(self, path: str | Path) -> None:
        """Write `codec.json`, and the model if it is a local one, into the folder `path`."""
        with files_into(path, last=CODEC_FILE) as folder:
            said = {
                "kind": self.kind,
                "model": keep_model(self.model, self.at, folder),
                "form": asdict(self.form),
                "layout": self.layout.settings(),
            }
            write_json(folder / CODEC_FILE, said)

    @classmethod
    def from_pretrained(cls, path: str | Path, **hub: Any) -> VqImageCodec:
        """Read what `save_pretrained` wrote.

        Args:
            path: the folder. hub: `cache_dir`, `token`, `local_files_only`, for a model on the Hub.

        Raises:
            ValueError: if the file is missing, of another kind, or does not say what this codec is; or if the model
                cannot be loaded, or has other weights than it had.
        """
        said = read_codec_file(path, cls.kind)
        try:
            form, layout, at = PictureForm(**said["form"]), said["layout"], said["model"]
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: {CODEC_FILE} says no VQ image codec ({error})") from error
        model, found = open_model(VqImageModel, kept_model(at, path, **hub))
        return cls(model, found, form, IdLayout(units=model.quantize.embedding.num_embeddings, **layout))

    def _pixels(self, value: Any) -> Tensor:
        """What the model sees of a picture, float32 ``[3, height, width]``."""
        picture = rgb(read_picture(value), (self.form.width, self.form.height), self.form.resample)
        seen = (np.asarray(picture, dtype=np.float32) / 255 - self.form.mean) / self.form.std
        return torch.from_numpy(seen.astype(np.float32)).permute(2, 0, 1)


class VqImageModel:
    """Loads the autoencoder alone, or out of a whole model; of the latter's other weights none is read."""

    @staticmethod
    def from_config(config: Any, **_: Any) -> Any:
        owner, config = VqImageModel._part(config)
        return owner(config)

    @staticmethod
    def _part(config: Any) -> tuple[Any, Any]:
        """The autoencoder's class and config, of its own config or a whole model's."""
        config = getattr(config, "vq_config", config)
        owner = {"janus_vqgan": JanusVQVAE, "emu3_vqgan": Emu3VQVAE}.get(config.model_type)
        if owner is None:
            raise ValueError(f"its VQ image model is {config.model_type!r}; known are janus_vqgan and emu3_vqgan")
        return owner, config

    @staticmethod
    def from_pretrained(source: str, *, dtype: torch.dtype, output_loading_info: bool, **hub: Any) -> Any:
        owner, config = VqImageModel._part(AutoConfig.from_pretrained(source, **hub))
        mapping = {PREFIX: ""}
        return owner.from_pretrained(
            source, config=config, key_mapping=mapping, output_loading_info=output_loading_info, dtype=dtype, **hub
        )


def _step(model: VqModel) -> int:
    """Pixels between two codes."""
    return 2 ** (len(model.config.channel_multiplier) - 1)


def _fixed_size(model: VqModel) -> int | None:
    """Height and width in pixels of a Janus; `None` if the model takes any multiple of its step."""
    return model.config.num_patches * _step(model) if isinstance(model, JanusVQVAE) else None


def _said_of_pictures(source: str, **where: Any) -> dict[str, Any]:
    """Mean, deviation and filter of a checkpoint's image processor. As its file says, which takes no more than that;
    what it leaves to the defaults of its class is asked of that, which takes torchvision with older transformers."""
    names = ("image_mean", "image_std", "resample")
    said, _ = ImageProcessingMixin.get_image_processor_dict(source, **where)
    if all(name in said for name in names):
        return said
    processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **where)
    return {name: getattr(processor, name) for name in names}


def _encoded(model: VqModel, pixels: Tensor) -> Tensor:
    """Codes, int64 ``[batch, codes]``, of pictures ``[batch, 3, height, width]``."""
    pixels = pixels.to(model.device)
    if isinstance(model, JanusVQVAE):
        return model.encode(pixels).image_tokens.view(len(pixels), -1)
    sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))
    return torch.stack(model.encode(pixels, image_sizes=sizes).image_tokens).flatten(1)


def _decoded(model: Any, codes: Tensor) -> Tensor:
    """Pictures ``[batch, 3, height, width]`` of codes ``[batch, rows, columns]``."""
    codes = codes.to(model.device)
    return model.decode(codes.flatten(1) if isinstance(model, JanusVQVAE) else codes)
