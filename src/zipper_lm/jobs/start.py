"""A recipe that goes on with a model that was fused before: its towers, codecs and zips are that model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from zipper_lm.data.processor import CODEC_FOLDERS
from zipper_lm.fusion.config import ZipperConfig
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.fusion.zip_spec import ZipSpec
from zipper_lm.jobs.recipes.reader import to_mapping
from zipper_lm.jobs.recipes.schema import CodecRecipe, FuseRecipe, TowerRecipe
from zipper_lm.models.baseline.config import is_single_decoder
from zipper_lm.models.checkpoint import read_config
from zipper_lm.models.records import RUN_FILE, generation_settings
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.utils.hub import CONFIG_FILE, local_folder
from zipper_lm.utils.json_files import read_mapping

_ALIKE = (
    *("revision", "train", "lora", "input_projection", "input_projection_layer", "input_projection_scale"),
    *("layers", "architecture", "prefix", "config_key", "config", "quantization"),
)
"""What a `TowerSpec` says and a recipe may say; not whether code may run: that is for the user to say."""

_LEFT_OUT = {"towers": {}, "zips": [to_mapping(ZipSpec())]}


def with_towers(recipe: FuseRecipe) -> FuseRecipe:
    """A recipe with the towers and zips of the model that it starts from; without `start`, the recipe itself.

    Its own may be left out, or be those of the recipe that the model was made by: then one file does for both runs.
    Generation settings and weights of losses are the model's, too, where the recipe has none.

    Raises:
        ValueError: if there is no such model, it is a single decoder, the recipe has other towers or zips, or is none.
    """
    if not isinstance(recipe, FuseRecipe):
        raise ValueError(f"give a FuseRecipe, got {recipe!r:.80}; read_recipe(FILE) makes one of a file")
    if recipe.start is None:
        return recipe
    config, folder = config_of_start(recipe.start), local_folder(recipe.start)
    towers = {name: _tower(name, spec, folder) for name, spec in config.tower_specs.items()}
    whole = replace(
        recipe,
        towers=towers,
        zips=config.zip_specs,
        generation=recipe.generation or generation_settings(folder),
        loss_weights=recipe.loss_weights or config.loss_weights,
    )
    record = folder / RUN_FILE
    made_by = read_mapping(record).get("recipe") if record.is_file() else None
    known = [_LEFT_OUT, to_mapping(whole), made_by if isinstance(made_by, dict) else {}]
    given = to_mapping(recipe)
    for field in ("towers", "zips"):
        if given[field] not in [each.get(field) for each in known]:
            of = f"those of start ({recipe.start})"
            raise ValueError(f"{field}: {of} are trained further, not others; leave {field} out")
    return whole


def config_of_start(start: str) -> ZipperConfig:
    """The config of the model that a recipe starts from.

    Raises:
        ValueError: if there is none, or it is a single decoder's.
    """
    try:
        folder = local_folder(start)
    except ValueError as error:
        raise ValueError(f"start: {error}") from error
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"start: {start} holds no model: no {CONFIG_FILE} there")
    if is_single_decoder(folder):
        raise ValueError(
            f"start: {start} is a single decoder, which is trained further as the source of the first tower, with "
            "architecture: single-decoder"
        )
    return read_config(folder)


def model_of_start(recipe: FuseRecipe) -> ZipperModel:
    """The model that a recipe starts from, with the recipe's weights of losses.

    Raises:
        ValueError: as `ZipperModel.from_pretrained`.
    """
    assert recipe.start is not None
    model = ZipperModel.from_pretrained(recipe.start)
    model.config.loss_weights = dict(recipe.loss_weights)
    return model


def _tower(name: str, spec: TowerSpec, folder: Path) -> TowerRecipe:
    codec = folder / CODEC_FOLDERS / name
    return TowerRecipe(
        source=str(folder / spec.source) if (folder / spec.source).is_dir() and spec.source else spec.source,
        codec=CodecRecipe(source=str(codec)) if codec.is_dir() else None,
        **{field: getattr(spec, field) for field in _ALIKE},
    )
