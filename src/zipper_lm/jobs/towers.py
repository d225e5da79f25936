"""The towers that a recipe names, made first if it says so, and the fresh model over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from zipper_lm.fusion.backbones import dtype_in_training
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.pretrain import clear_trained, open_unaligned, pretrain
from zipper_lm.jobs.recipes.schema import FuseRecipe, PretrainRecipe, TowerRecipe
from zipper_lm.jobs.start import model_of_start
from zipper_lm.models.assemble import codec_of
from zipper_lm.models.baseline.config import is_single_decoder
from zipper_lm.models.baseline.expand import expand
from zipper_lm.models.baseline.single_decoder import SingleDecoder
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.utils.processes import is_main


def missing_towers(recipe: FuseRecipe) -> list[str]:
    """The towers that a recipe wants made and that are not there yet."""
    return [n for n, t in recipe.towers.items() if t.pretrain is not None and not Path(t.source).is_dir()]


def make_towers(recipe: FuseRecipe, console: Console, halted: Sequence[str] = ()) -> None:
    """Pre-train the towers that a recipe wants made and that are not there yet.

    Args:
        recipe: the fusion's. console: where progress is told. halted: towers to go on with from their checkpoints.

    Raises:
        ValueError: as `pretrain`; what is wrong with the data of any of them, before the first is trained.
    """
    missing = missing_towers(recipe)
    for name, tower in recipe.towers.items():
        if tower.pretrain is not None and name not in missing and is_main():
            clear_trained(_pretrain_recipe(name, tower, recipe))
    for name in missing:  # before the first of them is trained
        if (alone := _pretrain_recipe(name, recipe.towers[name], recipe).data) is not recipe.data:
            open_unaligned(alone)
    for name in missing:
        tower = recipe.towers[name]
        console.print(f"pre-training tower {name!r} on unaligned data -> {tower.source}")
        console.print(
            pretrain(
                _pretrain_recipe(name, tower, recipe),
                overwrite=recipe.overwrite,
                resume=name in halted,
                console=console,
            )
        )


def _pretrain_recipe(name: str, tower: TowerRecipe, recipe: FuseRecipe) -> PretrainRecipe:
    here = tower.pretrain
    assert here is not None
    return PretrainRecipe(
        data=here.data or recipe.data,
        modality=name,
        codec=here.codec,
        backbone=here.backbone,
        training=here.training,
        context=here.context,
        embeddings=here.embeddings,
        ctc_limit=here.ctc_limit,
        output=tower.source,
        seed=recipe.seed,
    )


def tower_spec(tower: TowerRecipe) -> TowerSpec:
    """What a recipe says of a tower, as `ZipperModel.fuse` takes it."""
    return TowerSpec(
        source=tower.source,
        revision=tower.revision,
        train=tower.train,
        lora=tower.lora,
        input_projection=tower.input_projection,
        input_projection_layer=tower.input_projection_layer,
        input_projection_scale=tower.input_projection_scale,
        layers=tower.layers,
        trust_remote_code=tower.trust_remote_code,
        architecture=tower.architecture,
        prefix=tower.prefix,
        config_key=tower.config_key,
        config=tower.config,
        quantization=tower.quantization,
    )


def build_model(recipe: FuseRecipe, checkpoint: Path | None = None) -> Writer:
    """A fresh model as the recipe describes it, or one that was trained before.

    Args:
        recipe: with towers.
        checkpoint: of the run to go on with, by which `jobs.start.with_towers` gave it those, where it has a `start`.

    Raises:
        ValueError: if a tower cannot be loaded, or a single decoder's modality has no codec.
    """
    if recipe.start is not None:
        return model_of_start(recipe, checkpoint)
    towers = {name: tower_spec(tower) for name, tower in recipe.towers.items()}
    codecs = {name: tower.codec.make() for name, tower in recipe.towers.items() if tower.codec is not None}
    if recipe.architecture == "zipper":
        model = ZipperModel.fuse(towers, codecs=codecs, zips=recipe.zips, loss_weights=recipe.loss_weights)
        return model.place({name: tower.device for name, tower in recipe.towers.items() if tower.device is not None})
    base, spec = next(iter(towers.items()))
    if is_single_decoder(spec.source):
        single = SingleDecoder.from_pretrained(spec.source, dtype=dtype_in_training(spec))
        adapted = single.config.spec.train == "lora"
        if sorted(single.names) != sorted(towers) or (adapted and spec.train != "lora"):
            raise ValueError(
                f"towers.{base}.source is a single decoder of {single.names}, trained {single.config.spec.train!r}; "
                f"the recipe has {list(towers)} and train {spec.train!r}"
            )
        if spec.train == "lora" and not adapted:
            single = single.with_adapters(spec.lora)
        single.config.loss_weights = dict(recipe.loss_weights)
        return single
    found = {name: codec_of(spec, codecs.get(name)) for name, spec in towers.items()}
    if missing := {name: why for name, (codec, why) in found.items() if codec is None}:
        raise ValueError(f"architecture: single-decoder needs a codec for every modality; there are none for {missing}")
    train = "lora" if spec.train == "lora" else "full"
    known = {name: codec for name, (codec, _) in found.items() if codec is not None}
    return expand(base, spec, known, train=train, lora=spec.lora, loss_weights=recipe.loss_weights)
