"""A model's parameters as training sees them: in which group, in which precision, and how many."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from zipper_lm.generation.writer import Writer
from zipper_lm.utils import products
from zipper_lm.utils.products import SLOW, slow_matrices
from zipper_lm.utils.shapes import has_values
from zipper_lm.utils.tensors import dtype_name

logger = logging.getLogger(__name__)


def parameter_groups(model: Writer, *, tower_learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters by what they are: new or a tower's, matrix (decayed) or not.

    Frozen + trainable = all is asserted here.
    """
    of_towers = {id(p) for p in model.pretrained_parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    frozen = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            frozen += parameter.numel()
            continue
        groups.setdefault((id(parameter) in of_towers, parameter.dim() >= 2), []).append(parameter)
    trainable = sum(p.numel() for group in groups.values() for p in group)
    assert frozen + trainable == sum(p.numel() for p in model.parameters()), "parameter groups must cover the model"
    if not trainable:
        raise ValueError("training: every parameter is frozen")
    return [
        {"params": group, "weight_decay": weight_decay if matrix else 0.0}
        | ({"lr": tower_learning_rate} if tower else {})
        for (tower, matrix), group in groups.items()
    ]


def check_precision(model: nn.Module, device: torch.device, computed_in: torch.dtype = torch.float32) -> None:
    """Warn of bfloat16 weights that are trained: they have 8 bits, so that an update of less than 1/512 of one is lost.

    Also where the processor multiplies slowly what is trained: matrices, frozen ones too, or what they are rounded to.

    Args:
        model: what is trained.
        device: where.
        computed_in: what autocast rounds to; float32: there is none.

    Raises:
        ValueError: for float16 weights that are trained.
    """
    half = {torch.float16: "", torch.bfloat16: ""}
    slow = {each for each in half if device.type == "cpu" and not products.is_multiplied_here(each)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in half:
            half[parameter.dtype] = half[parameter.dtype] or name
    advice = "load it as float32 (towers.NAME.config: {dtype: float32})"
    if torch.bfloat16 not in slow:
        advice += " and set training.arguments: {bf16: true}"
    if name := half[torch.float16]:
        raise ValueError(f"training: {name} is float16, whose range is too narrow for training; {advice}")
    if name := half[torch.bfloat16]:
        logger.warning("training: %s is bfloat16, in which small updates are lost; %s", name, advice)
    if all(map(has_values, model.parameters())):  # a plan's have none: it is for whatever device
        for dtype, name in slow_matrices(model, device).items():
            logger.warning("training: %s is %s, %s; %s", name, dtype_name(dtype), SLOW, advice)
        if computed_in in slow:
            what = {torch.bfloat16: "bf16", torch.float16: "fp16"}[computed_in]
            logger.warning("training.arguments.%s=true: %s, %s; leave it out", what, dtype_name(computed_in), SLOW)


def describe_parameters(model: Writer) -> str:
    """One line: what is trained and what is frozen, and that it adds up."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert trained + frozen == total
    share = 100 * trained / total
    return (
        f"parameters: {trained:,} trained + {frozen:,} frozen = {total:,} ({share:.1f} %); {model.describe_training()}"
    )
