"""`zipper fuse`: the main job. Towers (made first if the recipe says so), aligned data, training, a checkpoint."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import EarlyStoppingCallback, set_seed

from zipper_lm.collation import Batch, collate
from zipper_lm.config import TowerSpec
from zipper_lm.data.tasks import TaskMixture, build_document, parse_task
from zipper_lm.document import Document
from zipper_lm.evaluation.attention import attention_entropy
from zipper_lm.evaluation.judge import Recogniser
from zipper_lm.evaluation.judging import judge_for
from zipper_lm.evaluation.preservation import perplexity
from zipper_lm.evaluation.scoring import score_task
from zipper_lm.files import check_output
from zipper_lm.model import ZipperModel
from zipper_lm.recipe import recipe_hash, to_mapping
from zipper_lm.training import signatures
from zipper_lm.training.arguments import training_arguments
from zipper_lm.training.data import encode_rows, length_ratio, training_rows, validation_rows
from zipper_lm.training.pretrain import pretrain
from zipper_lm.training.recipes import FuseRecipe, PretrainRecipe, TowerRecipe
from zipper_lm.training.trainer import ZipperTrainer, describe_parameters, latest_checkpoint

DIAGNOSIS_BATCHES = 8


def fuse(recipe: FuseRecipe, *, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run a recipe from its towers to a saved model.

    Args:
        recipe: what to do. resume: go on from the newest checkpoint of an interrupted run with the same recipe.
        console: where progress is told; `None` is standard error.

    Returns:
        The run's record, also written to ``run.json`` beside the model: recipe and its hash, scores on the validation
        split, losses, gates, failure signatures, perplexities, seconds.

    Raises:
        ValueError: for anything in the recipe that cannot work, before training starts.
    """
    console = console or Console(stderr=True)
    started = time.time()
    check_output(recipe.output, recipe.overwrite)
    tasks = {template: parse_task(template, list(recipe.towers)) for template in recipe.tasks}
    if not tasks:
        raise ValueError("tasks: name at least one, such as {'speech->text': 1}")
    working = Path(f"{recipe.output}.training")
    if resume and latest_checkpoint(working) is None:
        raise ValueError(f"nothing to resume: no checkpoint in {working}")
    arguments = training_arguments(recipe.training, working, recipe.seed, **_evaluation_arguments(recipe))
    for name, tower in recipe.towers.items():
        if tower.pretrain is not None and not Path(tower.source).is_dir():
            console.print(f"pre-training tower {name!r} on unaligned data -> {tower.source}")
            console.print(pretrain(_pretrain_recipe(name, tower, recipe)))
    set_seed(recipe.seed)
    model = build_model(recipe)
    assert model.processor is not None
    console.print(describe_parameters(model))
    raw = training_rows(recipe.data, recipe.seed)
    held_out = validation_rows(recipe.data)
    modalities = sorted({m for task in tasks.values() for m in task.modalities} | ({"text"} & set(model.names)))
    rows = encode_rows(model.processor, raw, modalities)
    validation = encode_rows(model.processor, held_out, modalities)
    for spec in model.config.zip_specs:
        if spec.stretch is None and (ratio := length_ratio(rows, spec.reader, spec.source)) is not None:
            model.set_stretch(spec.reader, spec.source, round(ratio, 4))
    mixture = TaskMixture(
        rows, recipe.tasks, seed=recipe.seed, interleave=recipe.training.interleave, towers=model.names
    )
    judge = _judge(recipe, console) if held_out and any(t.targets[-1] == "speech" for t in tasks.values()) else None
    trainer = ZipperTrainer(
        model,
        arguments,
        mixture,
        corrupt=recipe.training.corrupt,
        tower_learning_rate=recipe.training.tower_learning_rate,
        score=_Scorer(recipe, validation, judge) if validation else None,
        callbacks=[EarlyStoppingCallback(recipe.training.patience)] if recipe.training.patience else None,
    )
    before = _Before(model, validation)
    result = trainer.train(resume_from_checkpoint=str(latest_checkpoint(working)) if resume else None)
    found = _diagnose(recipe, model, rows, validation, before) if validation else []
    for signature in found:
        console.print(f"[yellow]{signature.name}:[/yellow] {signature.message}")
    mapping = to_mapping(recipe)
    record = {
        "recipe": mapping,
        "recipe_hash": recipe_hash(mapping),
        "seconds": round(time.time() - started, 1),
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "gates": model.gates(),
        "signatures": [s.message for s in found],
        "perplexity_before": before.perplexity,
        "history": trainer.state.log_history,
    }
    model.eval()
    model.save_pretrained(recipe.output, overwrite=recipe.overwrite)
    (Path(recipe.output) / "run.json").write_text(json.dumps(record, indent=2, default=float) + "\n", encoding="utf-8")
    (Path(recipe.output) / "generation.json").write_text(json.dumps(recipe.generation, indent=2) + "\n")
    _keep_logs(working, Path(recipe.output))
    return record


def build_model(recipe: FuseRecipe) -> ZipperModel:
    """A fresh model as the recipe describes it."""
    towers = {
        name: TowerSpec(
            source=tower.source,
            revision=tower.revision,
            train=tower.train,
            lora=tower.lora,
            input_projection=tower.input_projection,
            layers=tower.layers,
            trust_remote_code=tower.trust_remote_code,
        )
        for name, tower in recipe.towers.items()
    }
    codecs = {name: tower.codec for name, tower in recipe.towers.items() if tower.codec is not None}
    return ZipperModel.fuse(towers, codecs=codecs, zips=recipe.zips, loss_weights=recipe.loss_weights)


def _pretrain_recipe(name: str, tower: TowerRecipe, recipe: FuseRecipe) -> PretrainRecipe:
    here = tower.pretrain
    assert here is not None
    return PretrainRecipe(
        data=recipe.data,
        modality=name,
        codec=here.codec,
        backbone=here.backbone,
        training=here.training,
        context=here.context,
        output=tower.source,
        seed=recipe.seed,
    )


def _evaluation_arguments(recipe: FuseRecipe) -> dict[str, Any]:
    if recipe.data.validation is None:
        return {}
    return {
        "eval_strategy": "steps",
        "eval_steps": recipe.training.evaluate_every or recipe.training.steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_wer",
        "greater_is_better": False,
    }


def _judge(recipe: FuseRecipe, console: Console) -> Recogniser:
    if recipe.judge is not None:
        return Recogniser.from_pretrained(recipe.judge)
    console.print("fitting a judge on the training recordings (once; cached)")
    return judge_for(recipe.data.source, recipe.data.columns)


class _Scorer:
    """Scores every task of a recipe on validation rows; ``wer`` is their mean."""

    def __init__(self, recipe: FuseRecipe, rows: Sequence[Any], judge: Recogniser | None) -> None:
        self.recipe, self.judge = recipe, judge
        self.rows = [r for r in rows if not isinstance(r, Document)]

    def __call__(self, model: ZipperModel) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for template in self.recipe.tasks:
            if parse_task(template).targets[-1] not in ("text", "speech"):
                continue
            score = score_task(model, self.rows, template, judge=self.judge, settings=self.recipe.generation)
            metrics[f"wer/{template}"], metrics[f"cer/{template}"] = score.wer, score.cer
        metrics["wer"] = float(np.mean([v for k, v in metrics.items() if k.startswith("wer/")]))
        return metrics


class _Before:
    """What is compared after training: gates, and the perplexity of towers that are trained."""

    def __init__(self, model: ZipperModel, validation: Sequence[Any]) -> None:
        self.gates = model.gates()
        self.perplexity = unimodal_perplexity(model, validation)


def unimodal_perplexity(model: ZipperModel, rows: Sequence[Any]) -> dict[str, float]:
    """Perplexity of every tower that is not frozen, on its own modality alone."""
    trained = [n for n, s in model.config.tower_specs.items() if s.train != "frozen"]
    plain = [r for r in rows if not isinstance(r, Document)]
    return {n: perplexity(model, n, [r[n].ids or [] for r in plain if n in r]) for n in trained if plain}


def _diagnose(
    recipe: FuseRecipe, model: ZipperModel, rows: Sequence[Any], validation: Sequence[Any], before: _Before
) -> list[signatures.Signature]:
    train, held_out = (_batches(recipe, model, r) for r in (rows, validation))
    found = signatures.drift(before.perplexity, unimodal_perplexity(model, validation))
    found += signatures.not_started(before.gates, model.gates(), _mean_entropy(model, held_out))
    found += signatures.too_little_data(signatures.losses_on(model, train), signatures.losses_on(model, held_out))
    return found


def _batches(recipe: FuseRecipe, model: ZipperModel, rows: Sequence[Any]) -> list[Batch]:
    """A few batches of every task, uncorrupted."""
    plain = [r for r in rows if not isinstance(r, Document)][: DIAGNOSIS_BATCHES * recipe.training.batch_size]
    documents = [build_document(t, r) for t in recipe.tasks for r in plain[:: len(recipe.tasks)]]
    size = recipe.training.batch_size
    return [collate(documents[i : i + size], model.specials) for i in range(0, len(documents), size)]


def _mean_entropy(model: ZipperModel, batches: Sequence[Batch]) -> dict[str, float]:
    seen: dict[str, list[float]] = {}
    for batch in batches:
        for name, value in attention_entropy(model, batch).items():
            seen.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in seen.items()}


def _keep_logs(working: Path, output: Path) -> None:
    """TensorBoard logs move beside the model; checkpoints of the finished run go."""
    for events in working.rglob("events.out.tfevents.*"):
        target = output / "logs" / events.name
        target.parent.mkdir(exist_ok=True)
        shutil.move(events, target)
    shutil.rmtree(working, ignore_errors=True)


def generation_settings(folder: str | Path) -> Mapping[str, Any]:
    """The generation settings kept with a model, per modality; empty if there are none."""
    file = Path(folder) / "generation.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
