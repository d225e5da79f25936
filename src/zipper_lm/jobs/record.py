"""What a fusion leaves: the model, and beside it the run's record, its generation settings, its card and its logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.failures import Failure, unimodal_perplexity
from zipper_lm.jobs.materials import Materials, Plan
from zipper_lm.jobs.recipes.reader import recipe_hash
from zipper_lm.jobs.resume import begun_from, keep_logs
from zipper_lm.jobs.start import bundle_again
from zipper_lm.models.card import refresh_card
from zipper_lm.models.records import GENERATION_FILE, RUN_FILE, weights_digest
from zipper_lm.training.trainer import ZipperTrainer
from zipper_lm.utils.files import new_folder, remove_folder, write_json
from zipper_lm.utils.machine import made_with
from zipper_lm.utils.places import place_of, relative_paths
from zipper_lm.utils.tensors import weights_hash


def run_record(
    plan: Plan,
    materials: Materials,
    trainer: ZipperTrainer,
    loss: float,
    before: dict[str, float],
    found: Sequence[Failure],
) -> dict[str, Any]:
    """What is known of a run when it is done.

    Args:
        plan: what was to be done. materials: what it was done with. trainer: that did it. loss: mean of training.
        before: perplexities before training. found: the failures that show.
    """
    recipe, model, state, start = plan.recipe, materials.model, trainer.state, begun_from(plan.working)
    rows = {recipe.data.train: materials.pairs}
    if recipe.data.validation:
        rows[recipe.data.validation] = len(materials.validation)
    return {
        "recipe": plan.plain,
        "recipe_hash": recipe_hash(plan.plain),
        **({"started_from": start} if start is not None else {}),
        "data": {
            "source": place_of(recipe.data.source),
            "rows": rows,
            **({"pseudo_labels": len(materials.labelled)} if materials.labelled else {}),
        },
        "relative_paths": sorted({recipe.output, *relative_paths(plan.plain)}),
        "made_with": made_with(),
        "train_loss": loss,
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "frozen_unchanged": frozen_unchanged(model),
        "gates": model.gates(),
        "parameters": {
            "all": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "broken": materials.broken.items,
        "signatures": [failure.message for failure in found],
        "perplexity_before": before,
        "perplexity_after": unimodal_perplexity(model, materials.validation),
        "history": state.log_history,
    }


def frozen_unchanged(model: Writer) -> dict[str, bool]:
    """Per frozen tower, whether its tensors still have the hash they had when the model was made."""
    frozen = {n: s for n, s in model.config.tower_specs.items() if s.train == "frozen"}
    return {n: weights_hash(model.backbones()[n]) == s.weights_hash for n, s in frozen.items()}


def write_run(plan: Plan, model: Writer, record: dict[str, Any]) -> None:
    """Put the model and all that belongs beside it in its place, and clear the working folder away.

    Args:
        plan: says where. model: that was trained. record: from `run_record`; the hash of the weights is added to it.
    """
    recipe = plan.recipe
    if recipe.start is not None and isinstance(model, ZippedTowers):
        bundle_again(model)
    with new_folder(recipe.output, recipe.overwrite) as folder:
        model.save_pretrained(folder, card=False)
        record["weights"] = weights_digest(folder)
        write_json(folder / RUN_FILE, record)
        write_json(folder / GENERATION_FILE, recipe.generation)
        refresh_card(folder, model, name=Path(recipe.output).name)
        keep_logs(plan.working, folder / "logs")
    remove_folder(plan.working)
