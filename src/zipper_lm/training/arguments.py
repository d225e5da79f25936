"""From a `TrainingRecipe` to `transformers.TrainingArguments`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from zipper_lm.training.recipe import TrainingRecipe

OF_ONE_TOWER: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0,), "the losses are the model's own"),
    "neftune_noise_alpha": ((None,), "each tower has embeddings of its own; training.corrupt changes what is read"),
    "include_num_input_tokens_seen": ((False, "no"), "a batch has a stream of ids for each modality"),
}
"""Fields that Trainer follows for one tower alone: the values that ask for nothing, and why a fused model lacks it."""


def training_arguments(
    recipe: TrainingRecipe, folder: str | Path, seed: int, *, alone: bool = False, **more: Any
) -> TrainingArguments:
    """Arguments for `Trainer`: cosine schedule, TensorBoard logs and checkpoints under `folder`.

    Args:
        recipe: how to train. folder: for what training writes. seed: of everything. alone: whether it is one tower that
            is trained. more: further fields that the recipe does not set.

    Raises:
        ValueError: if `recipe.arguments` names an unknown field, one that the recipe sets itself, or one that only a
            tower alone can follow.
    """
    known = set(TrainingArguments.__dataclass_fields__)
    if unknown := sorted(set(recipe.arguments) - known):
        raise ValueError(f"training.arguments: {unknown} are no fields of transformers.TrainingArguments")
    for name, (nothing, reason) in () if alone else OF_ONE_TOWER.items():
        if (value := recipe.arguments.get(name, nothing[0])) not in nothing:
            raise ValueError(f"training.arguments: {name}={value!r} is not possible here: {reason}")
    fixed = {
        "output_dir": str(folder),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "warmup_steps": round(recipe.warmup * recipe.steps),
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.clip,
        "adam_beta1": recipe.betas[0],
        "adam_beta2": recipe.betas[1],
        "logging_steps": recipe.log_every,
        "save_strategy": "steps",
        "save_steps": recipe.evaluate_every or recipe.steps,
        "remove_unused_columns": False,
        "seed": seed,
        **more,
    }
    if doubled := sorted(set(recipe.arguments) & set(fixed)):
        raise ValueError(f"training.arguments: {doubled} are set by the recipe's own fields")
    free = {
        "per_device_eval_batch_size": recipe.batch_size,
        "disable_tqdm": False,  # else it follows the verbosity of transformers
        "lr_scheduler_type": "cosine",
        "save_total_limit": 2,
        "report_to": ["tensorboard"],
        "logging_nan_inf_filter": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "restore_callback_states_from_checkpoint": True,
        # A batch need not have all modalities. Trainer's own default is False under gradient checkpointing, for the
        # reentrant kind.
        "ddp_find_unused_parameters": True,
        "ddp_timeout": 7200,  # seconds; the others wait while one process fits a codec or a judge
    }
    try:
        arguments = TrainingArguments(**{**free, **recipe.arguments, **fixed})
    except (TypeError, ImportError) as error:
        raise ValueError(f"training.arguments: {error}") from error
    if arguments.n_gpu > 1:  # one process: Trainer would split each batch by DataParallel, which towers cannot take
        arguments._n_gpu = 1
    return arguments


def evaluation_arguments(recipe: TrainingRecipe, validation: str | None, metric: str) -> dict[str, Any]:
    """Further arguments where there is a validation split: it is looked at every `evaluate_every` steps and at the end,
    and the checkpoint with the least `metric` is the result.

    Args:
        recipe: how to train. validation: name of the split, if there is one. metric: name, ``eval_...``.
    """
    if validation is None:
        return {}
    return {
        "eval_strategy": "steps",
        "eval_steps": recipe.evaluate_every or recipe.steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": False,
    }
