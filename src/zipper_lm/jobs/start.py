"""A recipe that goes on with a model that was fused before: its towers, codecs and zips are that model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zipper_lm.data.processor import CODEC_FOLDERS
from zipper_lm.fusion.backbones import base_tensors, check_trust
from zipper_lm.fusion.config import ZipperConfig
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.jobs.agreement import DTYPES, check_towers, check_zips, has_moved, lies_with_model
from zipper_lm.jobs.recipes.schema import CodecRecipe, FuseRecipe, TowerRecipe
from zipper_lm.models.baseline.config import is_single_decoder
from zipper_lm.models.card.records import is_bundled, mapping_if_whole
from zipper_lm.models.checkpoint import bundle, read_config
from zipper_lm.models.records import GENERATION_FILE, RUN_FILE, generation_settings, weights_digest
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.utils.arguments import dtype_of
from zipper_lm.utils.hub import CONFIG_FILE, WEIGHTS_FILE, commit_of, local_folder
from zipper_lm.utils.places import place_of
from zipper_lm.utils.tensors import dtype_name, tensors_hash

_ALIKE = (
    *("train", "lora", "input_projection", "input_projection_layer", "input_projection_scale"),
    *("layers", "architecture", "prefix", "config_key", "quantization"),
)
"""What a `TowerSpec` says and a recipe may say, and what is the same in both."""

_DESCRIPTION = (CONFIG_FILE, GENERATION_FILE, f"{CODEC_FOLDERS}/*")
"""Files by which a model is known without its weights."""


def check_kind(recipe: Any) -> None:
    """Raise `ValueError` for what is no recipe of a fusion."""
    if not isinstance(recipe, FuseRecipe):
        raise ValueError(f"give a FuseRecipe, got {recipe!r:.80}; read_recipe(FILE) makes one of a file")


def with_towers(recipe: FuseRecipe, checkpoint: Path | None = None) -> FuseRecipe:
    """A recipe with the towers of the model that it starts from; without `start`, the recipe itself.

    Its own may be left out, some or all, or be those of the model: then one file does for both runs. Generation
    settings and weights of losses are the model's, too, for modalities of which the recipe has none.

    Args:
        recipe: as it was given.
        checkpoint: of a run by it, to go on from: that has all that it took from `start`, which may have changed since.

    Raises:
        ValueError: if there is no such model, it is a single decoder, the recipe has other towers, or is none.
    """
    check_kind(recipe)
    if recipe.start is None:
        return recipe
    folder = checkpoint or _described(recipe.start)
    config = config_of_start(recipe.start) if checkpoint is None else read_config(checkpoint)
    specs = config.tower_specs
    check_towers(recipe.start, recipe.towers, specs, config.zip_specs)
    towers = {name: _tower(name, spec, recipe, folder) for name, spec in specs.items()}
    return replace(
        recipe,
        towers=towers,
        generation={**generation_settings(folder), **recipe.generation},
        loss_weights={**config.loss_weights, **recipe.loss_weights},
    )


def config_of_start(start: str) -> ZipperConfig:
    """The config of the model that a recipe starts from; of one on the Hub the weights are not fetched.

    Raises:
        ValueError: if there is none, or it is a single decoder's.
    """
    folder = _described(start)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"start: {start} holds no model: no {CONFIG_FILE} there")
    if is_single_decoder(folder):
        raise ValueError(
            f"start: {start} is a single decoder, which is trained further as the source of the first tower, with "
            "architecture: single-decoder"
        )
    return read_config(folder)


def model_of_start(recipe: FuseRecipe, checkpoint: Path | None = None) -> ZipperModel:
    """The model that a recipe starts from, where and in what the recipe wants its towers, with its weights of losses.

    Args:
        recipe: from `with_towers`. checkpoint: as there.

    Raises:
        ValueError: as `ZipperModel.from_pretrained`; if the recipe has other zips.
    """
    assert recipe.start is not None
    folder = checkpoint or local_folder(recipe.start)
    config, moved = read_config(folder), []
    for name, spec in config.tower_specs.items():
        tower, fields = recipe.towers[name], config.towers[name]
        if not lies_with_model(name, spec):
            moved += [name] if (tower.source, tower.revision) != (spec.source, spec.revision) else []
            fields |= {"source": tower.source, "revision": tower.revision}
        elif is_bundled(name, spec):
            # Else each checkpoint of the training would hold the whole tower anew. See `bundle_again`.
            fields["source"] = place_of(folder / spec.source)
    untrusted = {n: fields for n, fields in config.towers.items() if not recipe.towers[n].trust_remote_code}
    check_trust(ZipperConfig(towers=untrusted), recipe.start, False)
    dtypes, trust = dtypes_of(recipe), recipe.trust_remote_code
    model = ZipperModel.from_pretrained(folder, config=config, dtype=dtypes, trust_remote_code=trust)
    check_zips(recipe.start, recipe.zips, model)
    for name in moved:
        tower = recipe.towers[name]
        place = place_of(tower.source)
        model.config.towers[name] |= {"source": place, "revision": commit_of(place, tower.revision)}
    for name in dtypes:
        _record_dtype(model, name)
    model.config.loss_weights = dict(recipe.loss_weights)
    return model.place({name: tower.device for name, tower in recipe.towers.items() if tower.device is not None})


def dtypes_of(recipe: FuseRecipe) -> dict[str, Any]:
    """In which dtypes a recipe wants towers of the model that it starts from; the others are as they were.

    Raises:
        ValueError: for what is no dtype.
    """
    found: dict[str, Any] = {}
    for name, tower in recipe.towers.items():
        asked = [value for field, value in (tower.config or {}).items() if field in DTYPES]
        dtype = dtype_of(f"towers.{name}.config", asked[0]) if asked else None
        found |= {name: dtype} if dtype is not None else {}
    return found


def bundle_again(model: ZippedTowers) -> None:
    """Let a model store towers along that lie with a fused model: with the one that it was started from, or another."""
    for name, spec in model.config.tower_specs.items():
        if spec.train != "full" and lies_with_model(name, spec):
            model.config.towers[name]["source"] = bundle(name)


def origin(start: str) -> dict[str, Any]:
    """What a record says of the model that a run started from: where it is, and, where a record of its own training
    lies beside it, how long that was and on what."""
    told, folder = {"source": place_of(start)}, local_folder(start, only=(RUN_FILE, WEIGHTS_FILE))
    run = mapping_if_whole(folder / RUN_FILE)
    if not run or not (folder / WEIGHTS_FILE).is_file() or run.get("weights") != weights_digest(folder):
        return told
    data = run.get("data")
    found = {"steps": run.get("steps"), "data": data.get("source") if isinstance(data, dict) else None}
    found["started_from"] = run.get("started_from")
    return told | {key: value for key, value in found.items() if value}


def _described(start: str) -> Path:
    """A folder with what describes the model."""
    try:
        return local_folder(start, only=_DESCRIPTION)
    except ValueError as error:
        raise ValueError(f"start: {error}") from error


def _tower(name: str, spec: TowerSpec, recipe: FuseRecipe, folder: Path) -> TowerRecipe:
    given, codec = recipe.towers.get(name, TowerRecipe()), folder / CODEC_FOLDERS / name
    source, revision = ("", None) if lies_with_model(name, spec) else (spec.source, spec.revision)
    if has_moved(name, given, spec):
        source, revision = given.source, given.revision
    elif source and given.revision and commit_of(source, given.revision) != revision:
        revision = given.revision
    trusted = {"trust_remote_code": True} if recipe.trust_remote_code else {}
    return TowerRecipe(
        source=source,
        revision=revision,
        codec=CodecRecipe(source=str(codec), options=trusted) if codec.is_dir() else None,
        trust_remote_code=given.trust_remote_code,
        device=given.device,
        config={**_rest(spec.config), **_dtype(given.config)} or None,
        **{field: getattr(spec, field) for field in _ALIKE},
    )


def _dtype(config: Mapping[str, Any] | None) -> dict[str, Any]:
    return {field: value for field, value in (config or {}).items() if field in DTYPES}


def _rest(config: Mapping[str, Any] | None) -> dict[str, Any]:
    return {field: value for field, value in (config or {}).items() if field not in DTYPES}


def _record_dtype(model: ZipperModel, name: str) -> None:
    """Let the config say in which dtype a tower is now: it is compared in that from now on, and loaded again."""
    fields, now = model.config.towers[name], dtype_name(model.tower(name).backbone.dtype)
    if fields["backbone"].get("dtype") == now:
        return
    fields["backbone"] = {**fields["backbone"], "dtype": now}
    fields["config"] = {**_rest(fields["config"]), "dtype": now} if _dtype(fields["config"]) else fields["config"]
    if fields["train"] != "full":
        fields["weights_hash"] = tensors_hash(base_tensors(model.tower(name)))
