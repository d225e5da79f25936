"""Training spread over processes by FSDP2, as accelerate's plugin does it: what it needs to know of a zipped model, and
what cannot be had with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import TrainingArguments

from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.sharding import check_shardable, units
from zipper_lm.utils.shards import is_sharded

_LEFT_OUT = {
    "activation_checkpointing": "it renames tensors; set training.arguments.gradient_checkpointing",
    "cpu_ram_efficient_loading": "every process loads the towers",
    "cpu_offload": "what is written and saved is gathered on devices",
}
"""Options of accelerate's plugin that are refused, and why."""


def check_launch(args: TrainingArguments) -> None:
    """Raise `ValueError` for a training that is launched with DeepSpeed: its engine takes a model's parameters away,
    and calls it by a forward of its own."""
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "DeepSpeed cannot train a fused model: launch with FSDP (training.arguments: {fsdp: true}), or whole models"
        )


def join_in(args: TrainingArguments, state: Any) -> bool:
    """Let accelerate spread a model over CPUs, too: it does so on accelerators alone, though `fully_shard` can.

    Args:
        args: of the training. state: accelerate's, which is changed.

    Returns:
        Whether models are spread.
    """
    asked = getattr(args, "fsdp_plugin_args", None)
    if asked is None or state.device.type != "cpu":
        return getattr(state, "fsdp_plugin", None) is not None
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**asked)
    if state.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
    state.distributed_type = DistributedType.FSDP
    return True


def spread(model: Any, args: TrainingArguments, state: Any, *, compiled: bool = False) -> bool:
    """Tell accelerate's plugin what is to be gathered together, and what is frozen and left alone.

    Args:
        model: to be trained. args: of it. state: accelerate's. compiled: whether its layers are.

    Returns:
        Whether the model is going to be spread.

    Raises:
        ValueError: for what cannot be had, by name.
    """
    asked = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    plugin = getattr(state, "fsdp_plugin", None)
    if not asked and plugin is None:
        return False
    if plugin is None:
        raise ValueError(
            "FSDP: the launcher asks for it, but accelerate would hold whole models here: set training.arguments.fsdp"
        )
    if not isinstance(model, ZippedTowers):
        raise ValueError(f"FSDP: only a fused model can be spread over processes, not a {type(model).__name__}")
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP: version {plugin.fsdp_version} cannot be followed: set version 2")
    if "FULL" not in str(plugin.state_dict_type):
        raise ValueError("FSDP: checkpoints are whole: set state_dict_type to FULL_STATE_DICT")
    for field, reason in _LEFT_OUT.items():
        given = getattr(plugin, field, None)
        if isinstance(given, CPUOffloadPolicy) or given is True:
            raise ValueError(f"FSDP: {field} cannot be followed: {reason}")
    if compiled:
        raise ValueError("FSDP: torch_compile together with it was never tried: leave one of them out")
    check_shardable(model)
    if plugin.ignored_modules is None:
        plugin.ignored_modules = list(frozen_modules(model))
    trained = {type(unit).__name__ for unit in units(model) if any(p.requires_grad for p in unit.parameters())}
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = sorted(trained)
    return True


def prepared(model: Any, prepare: Callable[..., Any], *objects: Any, **how: Any) -> Any:
    """`Accelerator.prepare` for a model that is going to be spread. It asks for a model's embeddings, to make units of
    them; a zipped one has several, and says so to transformers by raising. It takes all that an optimizer steps for the
    model's, so that groups of other tensors, which stay whole in each process, are kept from it."""
    own, others = set(model.parameters()), list[tuple[torch.optim.Optimizer, list[Any]]]()
    for optimizer in (each for each in objects if isinstance(each, torch.optim.Optimizer)):
        others.append((optimizer, [group for group in optimizer.param_groups if own.isdisjoint(group["params"])]))
        optimizer.param_groups = [group for group in optimizer.param_groups if not own.isdisjoint(group["params"])]
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        ready = prepare(*objects, **how)
    finally:
        del model.get_input_embeddings, model.get_output_embeddings
        for optimizer, groups in others:
            optimizer.param_groups += groups  # of a list that may be another one by now
    if any(each is model for each in objects) and not is_sharded(model):
        raise ValueError("FSDP: accelerate did not spread the model: each process would hold the whole of it")
    return ready


def frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules of which no parameter is trained."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        yield module
        return
    for child in module.children():
        yield from frozen_modules(child)
