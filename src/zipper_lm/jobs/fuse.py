"""`zipper fuse`: the main job. Towers (made first if the recipe says so), aligned data, training, a checkpoint."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import EarlyStoppingCallback, set_seed

from zipper_lm.data.broken import Broken
from zipper_lm.data.document import Segment
from zipper_lm.data.encoding import encode_rows, encoded_modalities, token_counts
from zipper_lm.data.mixture import TaskMixture, joiners
from zipper_lm.data.prepared import TRAIN, is_prepared, open_prepared
from zipper_lm.evaluation.judges import load_judge
from zipper_lm.fusion.backbones import dtype_in_training
from zipper_lm.fusion.config import TowerSpec
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.failures import diagnose, unimodal_perplexity
from zipper_lm.jobs.pretrain import open_unaligned, pretrain
from zipper_lm.jobs.pseudo_labels import (
    check_labeller,
    label,
    labeller_recipe,
    mixed,
    open_unlabelled,
    read_labels,
    write_labels,
)
from zipper_lm.jobs.recipes.checks import check_lengths, check_recipe, joined_tasks
from zipper_lm.jobs.recipes.reader import recipe_hash, to_mapping
from zipper_lm.jobs.recipes.schema import FuseRecipe, PretrainRecipe, TowerRecipe
from zipper_lm.jobs.resume import begin, check_working, keep_logs, working_folder
from zipper_lm.jobs.rows import measure_stretch, open_split, training_rows, validation_rows
from zipper_lm.jobs.validation import Scorer
from zipper_lm.models.assemble import codec_of
from zipper_lm.models.baseline.single_decoder import SingleDecoder, expand, is_single_decoder
from zipper_lm.models.card import GENERATION_FILE, RUN_FILE, refresh_card
from zipper_lm.models.load import load
from zipper_lm.models.results import weights_digest
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.training.arguments import evaluation_arguments, training_arguments
from zipper_lm.training.callbacks import Interrupted, StopOnInterrupt, train_with_bar
from zipper_lm.training.guided_attention import guided_pairs
from zipper_lm.training.parameters import describe_parameters
from zipper_lm.training.trainer import ZipperTrainer, latest_checkpoint
from zipper_lm.utils.files import new_folder
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.machine import made_with
from zipper_lm.utils.places import place_of, relative_paths
from zipper_lm.utils.processes import from_main, is_main, main_console, wait
from zipper_lm.utils.tensors import weights_hash


def fuse(recipe: FuseRecipe, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run a recipe from its towers to a saved model.

    Args:
        recipe: what to do.
        resume: go on from the newest checkpoint of an interrupted run with the same recipe.
        console: where progress is told; `None` is standard error.

    Returns:
        The run's record, also written to ``run.json`` beside the model: recipe and its hash, scores on the validation
        split, losses, gates, failure signatures, perplexities, seconds, versions and machine.

    Raises:
        ValueError: for anything in the recipe that cannot work, before training starts.
        Interrupted: after Ctrl-C; a checkpoint has been written.
    """
    started = time.time()
    working, plain = working_folder(recipe.output), to_mapping(recipe)
    tasks = check_recipe(recipe)
    making = _missing_towers(recipe)
    halted = [n for n in making if latest_checkpoint(working_folder(recipe.towers[n].source))] if resume else []
    # Of a run with pseudo-labels, the model that writes them may be what was interrupted, or what is done.
    here = resume and not halted and (recipe.pseudo_labels is None or latest_checkpoint(working) is not None)
    checkpoint = check_working(working, plain, resume=here, overwrite=recipe.overwrite)
    evaluation = evaluation_arguments(recipe.training, recipe.data.validation, "eval_wer")
    arguments = training_arguments(recipe.training, working, recipe.seed, **evaluation)
    console = console or main_console()  # after the arguments, which say how to connect
    judge = load_judge(recipe.judge) if recipe.judge is not None else None
    named = {m for task in tasks.values() for m in task.modalities}
    prepared = open_prepared(recipe.data.source) if is_prepared(recipe.data.source) else None
    if prepared is not None:
        prepared.check_modalities(named)
    opened = open_split(recipe.data, TRAIN)
    held_out = validation_rows(recipe.data)
    unlabelled = open_unlabelled(recipe) if recipe.pseudo_labels is not None else None
    make_towers(recipe, console, halted)
    labeller = make_labeller(recipe, console, resume) if checkpoint is None else None
    set_seed(recipe.seed)
    model = build_model(recipe)
    assert model.processor is not None
    if arguments.device.type == "cuda":
        model.processor.to(arguments.device)
    if prepared is not None:
        prepared.check_codecs(model.processor.codecs)
    joined = sorted({m for template in joined_tasks(recipe) for m in tasks[template].modalities})
    how = joiners(model.processor.codecs, joined)
    console.print(describe_parameters(model))
    broken = Broken(recipe.data.broken_limit)
    rows = _encoded(model, training_rows(recipe.data, recipe.seed, opened, broken), named, broken)
    validation = _encoded(model, held_out, named, broken)
    pairs = len(rows)
    labelled: list[dict[str, Segment]] = []
    if recipe.pseudo_labels is not None and unlabelled is not None:
        if labeller is None:
            labelled = read_labels(working)
        else:
            check_labeller(labeller, model, unlabelled[0], recipe)
            # Every process writes them, and all take the main one's: a token may differ from device to device.
            written = label(labeller, model, *unlabelled, recipe.pseudo_labels, recipe.generation, broken)
            labelled, labeller = from_main(written), None
        console.print(f"pseudo-labels: {len(labelled)} rows of {recipe.pseudo_labels.task}, beside {pairs} pairs")
        rows = mixed(rows, labelled, recipe.pseudo_labels.share)
    if broken.items:
        console.print(f"[yellow]{broken.told()}[/yellow]")
    if isinstance(model, ZipperModel):
        measure_stretch(model, rows)
    mixture = TaskMixture(
        rows,
        recipe.tasks,
        seed=recipe.seed,
        interleave=recipe.training.interleave,
        join=recipe.training.join,
        how=how,
        towers=model.names,
    )
    together = (2 if recipe.training.interleave else 1) * (2 if how else 1)
    trained = [task for template, task in tasks.items() if recipe.tasks[template] > 0]
    check_lengths(model, chain(token_counts(rows), token_counts(validation)), trained, together)
    scorer = Scorer(recipe, model, validation) if validation else None
    if scorer is not None:
        scorer.find_judges(model, judge, console)
        if not scorer.tasks:
            arguments.metric_for_best_model = "eval_loss"
    if checkpoint is None and is_main():
        begin(working, plain)
        if labelled:
            write_labels(working, labelled)
    wait()
    stop = StopOnInterrupt()
    patience = recipe.training.patience
    trainer = ZipperTrainer(
        model,
        arguments,
        mixture,
        corrupt=recipe.training.corrupt,
        history_dropout=recipe.training.history_dropout,
        tower_learning_rate=recipe.training.tower_learning_rate,
        guided=guided_pairs(recipe.training.guided_attention, tasks),
        score=scorer,
        callbacks=[stop, *([EarlyStoppingCallback(patience)] if patience else [])],
    )
    before = unimodal_perplexity(model, validation)
    try:
        result = train_with_bar(trainer, console, "fusing", str(checkpoint) if checkpoint else None)
    finally:
        stop.release()
    if stop.stopped:
        raise Interrupted(f"stopped after step {trainer.state.global_step}; go on with resume (--resume)")
    model.eval()
    found = diagnose(recipe, model, rows, validation, before) if validation else []
    for signature in found:
        console.print(f"[yellow]{signature.name}:[/yellow] {signature.message}")
    record = {
        "recipe": plain,
        "recipe_hash": recipe_hash(plain),
        "data": {
            "source": place_of(recipe.data.source),
            "rows": {
                recipe.data.train: pairs,
                **({recipe.data.validation: len(validation)} if recipe.data.validation else {}),
            },
            **({"pseudo_labels": len(labelled)} if labelled else {}),
        },
        "relative_paths": sorted({recipe.output, *relative_paths(plain)}),
        "made_with": made_with(),
        "seconds": round(time.time() - started, 1),
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "frozen_unchanged": frozen_unchanged(model),
        "gates": model.gates(),
        "parameters": {
            "all": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "broken": broken.items,
        "signatures": [s.message for s in found],
        "perplexity_before": before,
        "perplexity_after": unimodal_perplexity(model, validation),
        "history": trainer.state.log_history,
    }
    if is_main():
        with new_folder(recipe.output, recipe.overwrite) as folder:
            model.save_pretrained(folder, card=False)
            record["weights"] = weights_digest(folder)
            _write_json(folder / RUN_FILE, record)
            _write_json(folder / GENERATION_FILE, recipe.generation)
            refresh_card(folder, model, name=Path(recipe.output).name)
            keep_logs(working, folder / "logs")
        shutil.rmtree(working, ignore_errors=True)
    wait()
    return record


def make_towers(recipe: FuseRecipe, console: Console, halted: Sequence[str] = ()) -> None:
    """Pre-train the towers that a recipe wants made and that are not there yet.

    Args:
        recipe: the fusion's. console: where progress is told. halted: towers to go on with from their checkpoints.

    Raises:
        ValueError: as `pretrain`; what is wrong with the data of any of them, before the first is trained.
    """
    missing = _missing_towers(recipe)
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


def make_labeller(recipe: FuseRecipe, console: Console, resume: bool = False) -> Writer | None:
    """The model that writes the recipe's pseudo-labels, fused first if it is not there yet; `None` without any.

    Args:
        recipe: the fusion's; its towers are there. console: where progress is told.
        resume: go on with it from its checkpoint, if it has one.
    """
    if recipe.pseudo_labels is None:
        return None
    first = labeller_recipe(recipe)
    if not Path(first.output).is_dir():
        console.print(f"fusing the model that writes pseudo-labels -> {first.output}")
        begun = latest_checkpoint(working_folder(first.output)) is not None or first.pseudo_labels is not None
        fuse(first, resume=resume and begun, console=console)
    return load(first.output, trust_remote_code=first.trust_remote_code)


def _missing_towers(recipe: FuseRecipe) -> list[str]:
    return [n for n, t in recipe.towers.items() if t.pretrain is not None and not Path(t.source).is_dir()]


def frozen_unchanged(model: Writer) -> dict[str, bool]:
    """Per frozen tower, whether its tensors still have the hash they had when the model was made."""
    frozen = {n: s for n, s in model.config.tower_specs.items() if s.train == "frozen"}
    return {n: weights_hash(model.backbones()[n]) == s.weights_hash for n, s in frozen.items()}


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, default=float) + "\n", encoding="utf-8")


def _encoded(model: Writer, rows: Iterable[Any], named: set[str], broken: Broken) -> Sequence[Any]:
    assert model.processor is not None
    return encode_rows(model.processor, rows, encoded_modalities(rows, named, model.names), broken)


def build_model(recipe: FuseRecipe) -> Writer:
    """A fresh model as the recipe describes it; a single decoder may also be one that was trained before.

    Raises:
        ValueError: if a tower cannot be loaded, or a single decoder's modality has no codec.
    """
    towers = {
        name: TowerSpec(
            source=tower.source,
            revision=tower.revision,
            train=tower.train,
            lora=tower.lora,
            input_projection=tower.input_projection,
            layers=tower.layers,
            trust_remote_code=tower.trust_remote_code,
            architecture=tower.architecture,
            prefix=tower.prefix,
            config_key=tower.config_key,
            config=tower.config,
            quantization=tower.quantization,
        )
        for name, tower in recipe.towers.items()
    }
    codecs = {name: tower.codec.make() for name, tower in recipe.towers.items() if tower.codec is not None}
    if recipe.architecture == "zipper":
        return ZipperModel.fuse(towers, codecs=codecs, zips=recipe.zips, loss_weights=recipe.loss_weights)
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
    if missing := sorted(name for name, codec in found.items() if codec is None):
        raise ValueError(f"architecture: single-decoder needs a codec for every modality; {missing} have none")
    train = "lora" if spec.train == "lora" else "full"
    known = {name: codec for name, codec in found.items() if codec is not None}
    return expand(base, spec, known, train=train, lora=spec.lora, loss_weights=recipe.loss_weights)


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
        output=tower.source,
        seed=recipe.seed,
    )


def generation_settings(folder: str | Path) -> Mapping[str, Any]:
    """The generation settings kept with a model, per modality; empty if there are none."""
    file = Path(folder) / GENERATION_FILE
    return read_mapping(file) if file.is_file() else {}
