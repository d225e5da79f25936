"""From a recipe to `TrainingArguments`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from zipper_lm.training.arguments import FOLLOWED, OF_ONE_TOWER, REFUSED, training_arguments
from zipper_lm.training.recipe import TrainingRecipe

MISTAKEN = ["num_train_epochs", "prediction_loss_only", "label_names", "push_to_hub", "deepspeed", "do_train"]


def test_fields_reach_transformers(tmp_path: Path) -> None:
    more = {"gradient_accumulation_steps": 3, "lr_scheduler_type": "linear"}
    arguments = training_arguments(TrainingRecipe(steps=40, warmup=0.1, arguments=more), tmp_path, seed=7)
    assert (arguments.max_steps, arguments.warmup_steps, arguments.seed) == (40, 4, 7)
    assert arguments.gradient_accumulation_steps == 3
    assert arguments.lr_scheduler_type == "linear"
    assert arguments.save_steps == 40
    assert training_arguments(TrainingRecipe(evaluate_every=5), tmp_path, seed=0).save_steps == 5


@pytest.mark.parametrize("name", ["max_steps", "seed", "learning_rate", "eval_steps", "output_dir", *MISTAKEN])
@pytest.mark.parametrize("alone", [False, True])
def test_what_is_not_followed_is_refused_by_name(name: str, alone: bool, tmp_path: Path) -> None:
    """Some were taken and ignored: a recipe with ``num_train_epochs: 50`` trained for `steps`."""
    with pytest.raises(ValueError, match=rf"training\.arguments: {name} cannot be set: \w"):
        training_arguments(TrainingRecipe(arguments={name: 3}), tmp_path, seed=0, alone=alone)


def test_every_field_is_followed_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the transformers that is here; one that a later version adds is refused until somebody has looked at it."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields <= FOLLOWED | set(REFUSED) | set(OF_ONE_TOWER)
    assert not FOLLOWED & set(REFUSED)
    assert not (FOLLOWED | set(REFUSED)) & set(OF_ONE_TOWER)
    new = {**TrainingArguments.__dataclass_fields__, "warp": None}
    monkeypatch.setattr(TrainingArguments, "__dataclass_fields__", new)
    with pytest.raises(ValueError, match="warp is a field of this transformers that zipper-lm does not know"):
        training_arguments(TrainingRecipe(arguments={"warp": 9}), tmp_path, seed=0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of machines without an accelerator")
def test_autocast_to_bfloat16_is_to_be_had_on_a_cpu(tmp_path: Path) -> None:
    """transformers refused it ("Your setup doesn't support bf16/gpu") unless `use_cpu` was set, too."""
    arguments = training_arguments(TrainingRecipe(arguments={"bf16": True}), tmp_path, seed=0)
    assert arguments.bf16
    assert arguments.device.type == "cpu"


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw", "adalomo"])
def test_optimizers_without_groups_are_refused(optim: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"optim='{optim}' takes no groups"):
        training_arguments(TrainingRecipe(arguments={"optim": optim}), tmp_path, seed=0)


def test_unknown_fields_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bf17"):
        training_arguments(TrainingRecipe(arguments={"bf17": True}), tmp_path, seed=0)


@pytest.mark.parametrize(
    ("name", "value", "none"),
    [
        ("label_smoothing_factor", 0.1, 0.0),
        ("neftune_noise_alpha", 5.0, None),
        ("include_num_input_tokens_seen", "all", "no"),
        ("average_tokens_across_devices", False, True),
    ],
)
def test_what_would_have_no_effect_is_refused(name: str, value: Any, none: Any, tmp_path: Path) -> None:
    """The first was taken and ignored, the others ended in errors of transformers once training had begun."""
    with pytest.raises(ValueError, match=rf"training\.arguments: {name}={value!r} is not possible here"):
        training_arguments(TrainingRecipe(arguments={name: value}), tmp_path, seed=0)
    training_arguments(TrainingRecipe(arguments={name: none}), tmp_path, seed=0)
    training_arguments(TrainingRecipe(arguments={name: value}), tmp_path, seed=0, alone=True)


def test_one_process_uses_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two GPUs in sight and no launcher, Trainer split each batch by DataParallel, whose replicas have no
    parameters to ask for their device: every fusion ended at its first step."""
    prepare = TrainingArguments.__post_init__

    def with_two(arguments: TrainingArguments) -> None:
        prepare(arguments)
        assert arguments.n_gpu <= 1  # sets the devices up
        arguments._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_two)
    assert training_arguments(TrainingRecipe(), tmp_path, seed=0).n_gpu == 1


def test_a_batch_need_not_have_all_modalities(tmp_path: Path) -> None:
    more = {"gradient_checkpointing": True}
    assert training_arguments(TrainingRecipe(arguments=more), tmp_path, seed=0).ddp_find_unused_parameters


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ignore_data_skip", True),
        ("dataloader_in_order", False),
        ("accelerator_config", {"split_batches": True}),
        ("accelerator_config", {"dispatch_batches": True}),
        ("accelerator_config", {"use_seedable_sampler": False}),
    ],
)
def test_the_order_of_documents_cannot_be_given_up(name: str, value: Any, tmp_path: Path) -> None:
    """These were taken, and documents came in another order with another number of workers, or after a resume."""
    with pytest.raises(ValueError, match=rf"training\.arguments: {name}.*is not possible here: \w"):
        training_arguments(TrainingRecipe(arguments={name: value}), tmp_path, seed=0)
    training_arguments(TrainingRecipe(arguments={"accelerator_config": {"even_batches": True}}), tmp_path, seed=0)
