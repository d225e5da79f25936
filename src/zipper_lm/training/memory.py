"""When a device's memory does not suffice for a step: what would fit is found by trying it.

The documents of the step that failed are read again and their gradients computed, a half of them, a quarter, and so on,
and all of them with gradient checkpointing. Nothing is learned from it: the run is at its end.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

_STATES = {"adamw": 2, "adam": 2, "lion": 1, "adagrad": 1, "sgd": 0}
"""Tensors as large as the weights that optimizers keep of them, by what their names contain; others: two."""


class OutOfMemory(ValueError):
    """A device's memory did not suffice for a training step; the message says what would fit."""


def told_with_what_fits(trainer: Trainer, inputs: dict[str, Any], error: str) -> str:
    """What happened, and what would fit, in words.

    Args:
        trainer: whose step failed; its gradients are dropped. inputs: of the batch. error: what torch said.
    """
    args, rows = trainer.args, _rows(inputs)
    happened = (
        f"out of memory on {args.device} in step {trainer.state.global_step + 1}, with {rows} rows in a batch of "
        f"training.batch_size {args.per_device_train_batch_size}: {error.splitlines()[0][:200]}"
    )
    return f"{happened} What would fit, as tried on this batch: {'; '.join(_fitting(trainer, inputs, rows))}"


def _fitting(trainer: Trainer, inputs: dict[str, Any], rows: int) -> list[str]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    found, accumulated = [], trainer.args.gradient_accumulation_steps
    reserved = _reserved(trainer, model)
    part = rows // 2
    while part and not _fits(trainer, model, inputs, part):
        part //= 2
    if part:
        size = max(1, trainer.args.per_device_train_batch_size * part // rows)
        steps = accumulated * -(-trainer.args.per_device_train_batch_size // size)
        found.append(f"training.batch_size {size} with training.arguments.gradient_accumulation_steps {steps}")
    if not trainer.args.gradient_checkpointing and _can_checkpoint(model):
        model.gradient_checkpointing_enable()
        try:
            if _fits(trainer, model, inputs, rows):
                found.append("the same batch with training.arguments.gradient_checkpointing true")
            elif not part and _fits(trainer, model, inputs, 1):
                found.append("one row at a time with training.arguments.gradient_checkpointing true")
        finally:
            model.gradient_checkpointing_disable()
    del reserved
    if not found:
        found.append("nothing, not one row: freeze towers or train them by lora, load them in bfloat16, or cut rows")
    if getattr(trainer, "prefixes", None) is not None and not getattr(trainer, "kept", True):
        found.append("not tried: training.prefix_cache disk spares frozen towers what lies below their first zips")
    return found


def _can_checkpoint(model: Any) -> bool:
    return hasattr(model, "gradient_checkpointing_enable") and getattr(model, "supports_gradient_checkpointing", True)


def _reserved(trainer: Trainer, model: nn.Module) -> list[Tensor]:
    """What the optimizer will keep from its first step on, if that has not been: bytes that nothing else can have."""
    optimizer = trainer.optimizer
    if optimizer is None or optimizer.state:
        return []
    kind = str(trainer.args.optim).lower()
    each = next((number for name, number in _STATES.items() if name in kind), 2)
    size = each * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    try:
        return [torch.empty(size, dtype=torch.uint8, device=trainer.args.device)]
    except torch.OutOfMemoryError:
        return []  # then nothing will fit


def _fits(trainer: Trainer, model: Any, inputs: dict[str, Any], rows: int) -> bool:
    """Whether the first rows of a batch can be read, and gradients computed."""
    fits, given, loss = True, dict[str, Any](), torch.zeros(())
    try:
        given = {key: each for key, each in inputs.items() if isinstance(each, Tensor | dict)}
        given = trainer._prepare_inputs(_first(given, rows))
        with trainer.compute_loss_context_manager():
            loss = model(**given).loss
        loss.backward()
    except torch.OutOfMemoryError:
        fits = False
    del given, loss
    model.zero_grad(set_to_none=True)
    gc.collect()
    if trainer.args.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def _rows(inputs: Any) -> int:
    """Of a batch: the first dimension of its tensors."""
    if isinstance(inputs, Tensor):
        return len(inputs)
    return max((_rows(each) for each in inputs.values() if isinstance(each, Tensor | dict)), default=0)


def _first(inputs: Any, rows: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[:rows]
    if isinstance(inputs, dict):
        return type(inputs)((key, _first(each, rows)) for key, each in inputs.items())
    return inputs
