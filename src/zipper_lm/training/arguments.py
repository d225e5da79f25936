"""From a `TrainingRecipe` to `transformers.TrainingArguments`."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from zipper_lm.training.recipe import TrainingRecipe
from zipper_lm.utils.processes import limit_waiting, on_cpus

_EVALUATION = "training.evaluate_every and data.validation say when and by what a model is scored"
_PUSH = "checkpoints stay here; zipper push uploads what is made"
_METRICS = "Trainer has nothing to measure but the loss here"
_SHARDS = "models are spread over processes by FSDP2 (training.arguments.fsdp), or are whole in each"

REFUSED = {
    "output_dir": "it is beside the recipe's output",
    "max_steps": "training.steps says so",
    "num_train_epochs": "training.steps says how long",
    "per_device_train_batch_size": "training.batch_size says so",
    "auto_find_batch_size": "training.batch_size says so",
    "learning_rate": "training.learning_rate says so",
    "warmup_steps": "training.warmup says so, as a share of the steps",
    "weight_decay": "training.weight_decay says so",
    "max_grad_norm": "training.clip says so",
    "adam_beta1": "training.betas says so",
    "adam_beta2": "training.betas says so",
    "optim_target_modules": "training.weight_decay and tower_learning_rate group the parameters",
    "logging_steps": "training.log_every says so",
    "logging_nan_inf_filter": "training stops at what is no number",
    **dict.fromkeys(("eval_strategy", "eval_steps", "load_best_model_at_end"), _EVALUATION),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), _EVALUATION),
    **dict.fromkeys(("prediction_loss_only", "label_names", "include_for_metrics", "batch_eval_metrics"), _METRICS),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"), _METRICS),
    **dict.fromkeys(("save_strategy", "save_steps"), "training.evaluate_every and training.save_every say so"),
    "save_only_model": "a checkpoint is there to go on from",
    "enable_jit_checkpoint": "Ctrl-C and SIGTERM are met with a checkpoint anyway",
    "resume_from_checkpoint": "use --resume",
    "restore_callback_states_from_checkpoint": "a resumed run goes on with all it knew",
    "remove_unused_columns": "data.columns names what is read",
    "seed": "the recipe's seed says so",
    "use_cache": "training keeps no cache",
    "local_rank": "the launcher says so",
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the command says what is done"),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _PUSH),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _PUSH),
    **dict.fromkeys(("deepspeed", "parallelism_config"), _SHARDS),
}
"""Fields that cannot be set, and what says it instead."""

_SCORED = "a fused model is scored by what it writes"
OF_ONE_TOWER: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0,), "the losses are the model's own"),
    "neftune_noise_alpha": ((None,), "each tower has embeddings of its own; training.corrupt changes what is read"),
    "include_num_input_tokens_seen": ((False, "no"), "a batch has a stream of ids for each modality"),
    "average_tokens_across_devices": ((True,), "losses are over the targets of all processes"),
    "train_sampling_strategy": ((), "documents of like length share a batch"),
    "length_column_name": ((), "documents of like length share a batch"),
    "use_liger_kernel": ((False,), "its kernels are for one family, and each tower has its own"),
    "liger_kernel_config": ((None,), "its kernels are for one family, and each tower has its own"),
    "per_device_eval_batch_size": ((), _SCORED),
    "bf16_full_eval": ((False,), _SCORED),
    "fp16_full_eval": ((False,), _SCORED),
}
"""Fields that Trainer follows for one tower alone: the values that ask for nothing, and why a fused model lacks it."""

# fmt: off
FOLLOWED = frozenset({
    "fsdp", "fsdp_config",
    "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "adam_epsilon", "gradient_accumulation_steps",
    "bf16", "fp16", "tf32", "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "torch_empty_cache_steps", "logging_strategy", "logging_first_step", "log_on_each_node", "log_level",
    "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "eval_delay", "eval_on_start", "save_on_each_node", "save_total_limit",
    "ignore_data_skip", "full_determinism", "data_seed", "use_cpu", "accelerator_config", "dataloader_drop_last",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "debug", "skip_memory_metrics",
})
# fmt: on
"""Fields that Trainer follows in a fusion as in any training."""
OF_FUSIONS = ("fsdp", "fsdp_config")
"""Fields that are followed where a model is fused, and not where one tower is trained alone."""

_ORDER = "the order of documents is the same with any number of workers and processes, and after a resume"
IN_ORDER: dict[str, tuple[tuple[Any, ...], str]] = {
    "ignore_data_skip": ((False,), _ORDER),
    "dataloader_in_order": ((True,), _ORDER),
    "accelerator_config.split_batches": ((False,), "training.batch_size counts for each process"),
    "accelerator_config.dispatch_batches": ((None, False), "each process reads its own documents"),
    "accelerator_config.use_seedable_sampler": ((True,), _ORDER),
}
"""Fields that would change which document comes when: the values that do not, and why no other is possible."""

_WHOLE_MODEL = ("galore", "apollo", "lomo")
"""Optimizers that do without our groups of parameters."""


def _check(arguments: Mapping[str, Any], alone: bool) -> None:
    """Raise `ValueError` for a field that is unknown, or that nothing here would follow."""
    known = set(TrainingArguments.__dataclass_fields__)
    if unknown := sorted(set(arguments) - known):
        raise ValueError(f"training.arguments: {unknown} are no fields of transformers.TrainingArguments")
    for name, value in arguments.items():
        if name in REFUSED:
            raise ValueError(f"training.arguments: {name} cannot be set: {REFUSED[name]}")
        if alone and name in OF_FUSIONS and value:
            raise ValueError(f"training.arguments: {name} is for fused models; a tower alone is whole in each process")
        if name in OF_ONE_TOWER:
            nothing, reason = OF_ONE_TOWER[name]
            if not alone and value not in nothing:
                raise ValueError(f"training.arguments: {name}={value!r} is not possible here: {reason}")
        elif name not in FOLLOWED:
            raise ValueError(
                f"training.arguments: {name} is a field of this transformers that zipper-lm does not know how to follow"
            )
    if any(part in str(arguments.get("optim", "")).lower() for part in _WHOLE_MODEL):
        raise ValueError(f"training.arguments: optim={arguments['optim']!r} takes no groups of parameters")


def autocast_dtype(args: TrainingArguments) -> torch.dtype:
    """What a trainer rounds float32 to where it multiplies; float32: nothing is rounded."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def training_arguments(
    recipe: TrainingRecipe, folder: str | Path, seed: int, *, alone: bool = False, **more: Any
) -> TrainingArguments:
    """Arguments for `Trainer`: cosine schedule, TensorBoard logs and checkpoints under `folder`.

    Args:
        recipe: how to train. folder: for what training writes. seed: of everything. alone: whether it is one tower that
            is trained. more: further fields that the recipe does not set.

    Raises:
        ValueError: if `recipe.arguments` names an unknown field, or one that would not be followed: as the recipe sets
            it itself, or only a tower alone can follow it.
    """
    _check(recipe.arguments, alone)
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
        "logging_nan_inf_filter": False,
        "restore_callback_states_from_checkpoint": True,
        "seed": seed,
        **more,
    }
    free = {
        "per_device_eval_batch_size": recipe.batch_size,
        "disable_tqdm": False,  # else it follows the verbosity of transformers
        "lr_scheduler_type": "cosine",
        "save_total_limit": 2,
        "report_to": ["tensorboard"],
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "use_cpu": on_cpus() or _is_narrow_on_cpu(recipe.arguments),
        # A batch need not have all modalities. Trainer's own default is False under gradient checkpointing, for the
        # reentrant kind.
        "ddp_find_unused_parameters": True,
        "ddp_timeout": 7200,  # seconds; the others wait while one process fits a codec or a judge
    }
    try:
        arguments = TrainingArguments(**{**free, **recipe.arguments, **fixed})
    except (TypeError, ImportError) as error:
        raise ValueError(f"training.arguments: {error}") from error
    for name, (values, reason) in IN_ORDER.items():
        if (value := attrgetter(name)(arguments)) not in values:
            raise ValueError(f"training.arguments: {name}={value!r} is not possible here: {reason}")
    if arguments.n_gpu > 1:  # one process: Trainer would split each batch by DataParallel, which towers cannot take
        arguments._n_gpu = 1
    limit_waiting(arguments.ddp_timeout)
    return arguments


def _is_narrow_on_cpu(arguments: Mapping[str, Any]) -> bool:
    """Whether bfloat16 is asked for on a machine without an accelerator, where transformers wants to be told."""
    return any(arguments.get(name) for name in ("bf16", "bf16_full_eval")) and not torch.accelerator.is_available()


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
