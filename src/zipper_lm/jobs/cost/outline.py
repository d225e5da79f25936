"""The model that a recipe describes, without values: of towers only their configs are read."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from zipper_lm.fusion.backbones import dtype_in_training, from_config, source_config
from zipper_lm.fusion.config import ZipperConfig
from zipper_lm.fusion.fields import plain
from zipper_lm.fusion.interface import embedding_of
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.agreement import check_zips
from zipper_lm.jobs.pretrain import make_backbone
from zipper_lm.jobs.recipes.schema import CodecRecipe, FuseRecipe, TowerRecipe
from zipper_lm.jobs.start import config_of_start, dtypes_of
from zipper_lm.jobs.towers import missing_towers, tower_spec
from zipper_lm.models.assemble import connect
from zipper_lm.models.baseline.config import SingleDecoderConfig, is_single_decoder
from zipper_lm.models.baseline.single_decoder import SingleDecoder
from zipper_lm.models.baseline.vocabulary import Modality
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.utils.shapes import without_values
from zipper_lm.utils.tensors import dtype_name

SIZES = ("vocab_size", "units")
"""Options of codecs that are fitted, which say how many ids they will have."""


class _Ids(NamedTuple):
    """What `make_backbone` asks of a codec that is not made yet; its special ids come last."""

    vocab_size: int

    @property
    def bos_id(self) -> int:
        return self.vocab_size - 3

    @property
    def eos_id(self) -> int:
        return self.vocab_size - 2

    @property
    def pad_id(self) -> int:
        return self.vocab_size - 1


def outline(recipe: FuseRecipe) -> Writer:
    """A model of a recipe, to be trained, without values (`zipper_lm.utils.shapes`) and without codecs. Special ids are
    the config's, or any: nothing that is counted depends on them.

    Raises:
        ValueError: naming the tower, if its config cannot be had, or what it would be is not known before it is loaded:
            one that is quantized, or has code of its own.
    """
    missing = missing_towers(recipe)
    with without_values():
        if recipe.start is not None:
            return _trained_before(recipe, config_of_start(recipe.start))
        if recipe.architecture != "zipper":
            return _single(recipe, missing)
        made = {name: _backbone(name, tower, name in missing) for name, tower in recipe.towers.items()}
        specs = {name: _described(tower_spec(recipe.towers[name]), backbone) for name, backbone in made.items()}
        return connect(ZipperModel, specs, made, recipe.zips, recipe.loss_weights)


def _trained_before(recipe: FuseRecipe, config: ZipperConfig) -> ZipperModel:
    """The model that a recipe starts from."""
    assert recipe.start is not None
    made, dtypes = {}, dtypes_of(recipe)
    for name, spec in config.tower_specs.items():
        _check_known(name, spec)
        made[name] = from_config(config.backbone_config(name), spec, dtypes.get(name))
    model = ZipperModel(config, made)
    check_zips(recipe.start, recipe.zips, model)
    return model


def _check_known(name: str, tower: TowerRecipe | TowerSpec) -> None:
    for field in ("quantization", "trust_remote_code"):
        if getattr(tower, field):
            raise ValueError(f"plan: towers.{name}.{field} is set: what it takes is not known before it is loaded")


def _backbone(name: str, tower: TowerRecipe, missing: bool) -> PreTrainedModel:
    """One tower's, as it would be loaded for training."""
    if missing:
        assert tower.pretrain is not None
        return make_backbone(tower.pretrain.backbone, _unmade(name, tower.pretrain.codec))
    _check_known(name, tower)
    spec = tower_spec(tower)
    try:
        config = source_config(spec)
    except ValueError as error:
        raise ValueError(f"plan: towers.{name}: no config: {error}") from error
    if is_single_decoder(tower.source) or config.model_type.startswith("zipper"):
        raise ValueError(f"plan: towers.{name}.source: {tower.source} holds a fused model, no decoder")
    said: Any = config.dtype or torch.float32
    dtype = dtype_in_training(spec) if spec.train == "full" else None
    try:
        return from_config(config, spec, dtype or (getattr(torch, said) if isinstance(said, str) else said))
    except Exception as error:  # families check their fields each in its own way
        raise ValueError(f"plan: towers.{name}: {str(error).strip().splitlines()[0]}") from error


def _unmade(name: str, codec: CodecRecipe) -> Any:
    """A codec that a tower is going to be trained with, as far as its number of ids goes."""
    for option in SIZES:
        if (codec.source is None or option == "units") and isinstance(found := codec.options.get(option), int):
            return _Ids(found + (3 if option == "units" else 0))
    try:
        return codec.make()
    except ValueError as error:
        raise ValueError(
            f"plan: towers.{name}.pretrain.codec ({codec.kind}): how many ids it will have is not known before it is "
            f"fitted; set options.{SIZES[0]} (text) or options.{SIZES[1]} (sound): {error}"
        ) from error


def _described(spec: TowerSpec, backbone: PreTrainedModel) -> TowerSpec:
    special, size = dict[str, Any](), len(embedding_of(backbone))
    for place, kind in enumerate(("bos", "eos", "pad"), 1):
        value: Any = getattr(backbone.config, f"{kind}_token_id", None)
        value = value[0] if isinstance(value, (list, tuple)) else value
        special[f"{kind}_token_id"] = value if isinstance(value, int) and 0 <= value < size else max(0, size - place)
    config = plain({**backbone.config.to_dict(), "dtype": dtype_name(backbone.dtype)})
    return replace(spec, architecture=type(backbone).__name__, backbone=config, **special)


def _single(recipe: FuseRecipe, missing: list[str]) -> SingleDecoder:
    """The baseline: the first tower, with the ids of the others."""
    base, tower = next(iter(recipe.towers.items()))
    if is_single_decoder(tower.source):
        raise ValueError(f"plan: towers.{base}.source: {tower.source} is a single decoder; name what it was made of")
    sizes = {name: len(embedding_of(_backbone(name, each, name in missing))) for name, each in recipe.towers.items()}
    like = _backbone(base, replace(tower, train="full"), base in missing)
    config = like.config
    config.vocab_size = sum(sizes.values())
    spec = replace(tower_spec(tower), train="lora" if tower.train == "lora" else "full")
    backbone = from_config(config, replace(spec, architecture=type(like).__name__), like.dtype)
    offsets = dict(zip(sizes, [sum(list(sizes.values())[:n]) for n in range(len(sizes))]))
    ids = [asdict(Modality(n, offsets[n], size, size - 3, size - 2, size - 1)) for n, size in sizes.items()]
    described = asdict(_described(spec, backbone))
    return SingleDecoder(SingleDecoderConfig(ids, described, recipe.loss_weights), backbone)
