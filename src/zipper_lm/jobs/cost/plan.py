"""`zipper plan`: what a recipe takes and how long it will train, before anything is loaded or trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import nn

from zipper_lm.data.tasks import Task
from zipper_lm.evaluation.cost import token_cost
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.prefix import prefix_depths
from zipper_lm.fusion.sharding import units
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.cost.devices import Device
from zipper_lm.jobs.cost.lengths import Lengths, read_lengths
from zipper_lm.jobs.cost.outline import outline
from zipper_lm.jobs.cost.processes import project
from zipper_lm.jobs.cost.step import Step, count_step
from zipper_lm.jobs.recipes.checks import check_settings
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.jobs.start import with_towers
from zipper_lm.training.prefix_cache import PrefixMode, modes_of
from zipper_lm.utils.tensors import dtype_name

FLOAT = "float32"
SPARE = 0.1
"""Share of a device's memory that is left: for what its allocator wastes and its libraries take."""


def plan(
    recipe: FuseRecipe,
    find: Any,
    *,
    lengths: Mapping[str, int] | None = None,
    processes: Sequence[int] = (),
    interconnect: float | None = None,
    ways: bool = True,
) -> dict[str, Any]:
    """What a fusion costs.

    Args:
        recipe: what is to be done. find: makes the `Device`, of the names of the dtypes that are computed in.
        lengths: tokens of a row by modality; of others the recipe's data says it.
        processes: numbers of them to project to. interconnect: GB/s that each has to the others; `None`: as assumed.
        ways: whether to look at what else would fit, or be quicker: LoRA, gradient checkpointing, the prefix cache,
            float32.

    Returns:
        Plain data, as ``zipper plan --json`` prints it.

    Raises:
        ValueError: naming field, value and limit, for what cannot be.
    """
    if any(number < 1 for number in processes):
        raise ValueError(f"plan: --processes={list(processes)}: must be at least 1 each")
    recipe = with_towers(recipe)
    tasks = check_settings(recipe)
    named = sorted({m for task in tasks.values() for m in task.modalities}) or list(recipe.towers)
    found = read_lengths(recipe, named, lengths or {})
    model = outline(recipe)
    parts = parameters(model)
    step = count_step(model, recipe, tasks, found)
    device: Device = find(tuple(step.flops))
    memory = _memory(model, step, device, recipe)
    seconds = device.seconds(step.flops, step.calls)
    steps, batch = recipe.training.steps, recipe.training.batch_size
    mean = {name: sum(row.get(name, 0) for row in found.rows) / len(found.rows) for name in named}
    told = {
        "device": {"name": device.name, "memory": device.memory, "origin": device.origin}
        | {
            "flops": {d: n * device.utilisation for d, n in device.peak.items()},
            "utilisation": device.utilisation,
            "launch": device.launch,
        },
        "parameters": parts,
        "batch": {"documents": batch, "accumulated": accumulated(recipe), "tokens": step.tokens, "lengths": mean},
        "memory": memory,
        "flops": {
            "step": sum(step.flops.values()),
            "by_dtype": step.flops,
            "calls": step.calls,
            "token": _written(model, mean),
        },
        "time": {"step": seconds, "steps": steps, "run": seconds * steps},
        "ways": _ways(recipe, tasks, found, device, _widened(recipe, model, device)) if ways else [],
    }
    if processes:
        told["processes"] = project(
            list(processes),
            seconds=seconds,
            steps=steps,
            documents=batch * accumulated(recipe),
            micro=accumulated(recipe),
            gradients=step.gradients,
            memory=memory,
            unit=_largest_unit(model),
            interconnect=interconnect,
            room=device.memory * (1 - SPARE),
        )
    return told


def accumulated(recipe: FuseRecipe) -> int:
    """Batches of an optimizer step."""
    return int(recipe.training.arguments.get("gradient_accumulation_steps", 1))


def parameters(model: Writer) -> dict[str, dict[str, int]]:
    """Frozen and trained parameters of each tower and of all that is new: zips by reader and source, and the rest."""
    if not isinstance(model, ZippedTowers):
        return {"decoder": _count(model.parameters())}
    parts = {name: _count(model.tower(name).parameters()) for name in model.names}
    zips: Any = model.zips
    for reader, source in model.layer_pairs:
        parts[f"{reader}<-{source}"] = _count(zips[reader][source].parameters())
    named = {id(p) for m in (model.towers, model.zips) for p in cast(nn.Module, m).parameters()}
    return parts | {"projections, handover": _count(p for p in model.parameters() if id(p) not in named)}


def _count(found: Any) -> dict[str, int]:
    both = {"frozen": 0, "trained": 0}
    for parameter in found:
        both["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return both


def _memory(model: Writer, step: Step, device: Device, recipe: FuseRecipe) -> dict[str, Any]:
    """Bytes in one process, and the largest batch that fits."""
    module = cast(nn.Module, model)
    weights = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    fixed = weights + step.gradients + step.optimizer
    room = device.memory * (1 - SPARE) - fixed
    total = weights + step.beside_weights
    return {
        "weights": weights,
        "trained_weights": trained,
        "gradients": step.gradients,
        "optimizer": step.optimizer,
        "activations": max(step.activations, step.update),
        "total": total,
        "fits": total <= device.memory * (1 - SPARE),
        # What a batch holds grows with it; a little of it, such as logits that are made part by part, does not.
        "largest_batch": 0 if room < step.update else max(0, int(room / step.growth)),
    }


def _written(model: Writer, lengths: Mapping[str, float]) -> dict[str, float]:
    """Operations for a token that each tower writes in the middle of a segment, everything else being read."""
    if not isinstance(model, ZippedTowers):
        return {}
    made = {}
    for name in model.names:
        cost = token_cost(model, name)
        seen = sum(z.step + z.per_memory * (lengths.get(source, 0) + 2) for source, z in cost.zips.items())
        made[name] = 2 * (cost.of_backbone(round(lengths.get(name, 0) / 2)) + cost.input_projection + seen)
    return made


def _widened(recipe: FuseRecipe, model: Writer, device: Device) -> dict[str, FuseRecipe]:
    """The recipe in float32, where the device multiplies more slowly what it is in, by what is changed for that."""
    slow = {dtype for dtype, peak in device.peak.items() if peak < device.peak.get(FLOAT, 0.0)}
    words, towers, arguments = [], dict(recipe.towers), dict(recipe.training.arguments)
    own = {n: model.tower(n).backbone.dtype for n in model.names} if isinstance(model, ZippedTowers) else {}
    for name, dtype in own.items():
        if dtype_name(dtype) in slow:
            words.append(f"towers.{name}.config.dtype={FLOAT}")
            towers[name] = replace(towers[name], config={**(towers[name].config or {}), "dtype": FLOAT})
    if arguments.get("bf16") and "bfloat16" in slow:
        words.append("training.arguments.bf16=false")
        arguments["bf16"] = False
    wide = replace(recipe, towers=towers, training=replace(recipe.training, arguments=arguments))
    return {" ".join(words): wide} if words else {}


def _ways(
    recipe: FuseRecipe, tasks: Mapping[str, Task], lengths: Lengths, device: Device, widened: Mapping[str, FuseRecipe]
) -> list[dict[str, Any]]:
    """The same recipe, each with one thing changed that saves memory, where it is not so already.

    Args:
        recipe, tasks, lengths, device: what is planned. widened: a way that saves time, as of `_widened`.
    """
    training = recipe.training
    changed: dict[str, FuseRecipe] = dict(widened)
    if not training.arguments.get("gradient_checkpointing"):
        arguments = {**training.arguments, "gradient_checkpointing": True}
        way = "training.arguments.gradient_checkpointing=true"
        changed[way] = replace(recipe, training=replace(training, arguments=arguments))
    full = [name for name, tower in recipe.towers.items() if tower.train == "full"]
    if full and recipe.start is None:
        towers = {n: replace(t, train="lora") if n in full else t for n, t in recipe.towers.items()}
        changed[" ".join(f"towers.{name}.train=lora" for name in full)] = replace(recipe, towers=towers)
    if training.prefix_cache is None and recipe.architecture == "zipper" and _can_keep(recipe):
        kept = replace(training, prefix_cache="memory", interleave=0.0, join=0.0)
        changed["training.prefix_cache=memory"] = replace(recipe, training=kept)
    made = []
    for way, other in changed.items():
        try:
            model = outline(other)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of the names that releases before 5.23 know
                step = count_step(model, other, tasks, lengths)
        except ValueError as error:
            made.append({"way": way, "error": str(error)})
            continue
        memory = _memory(model, step, device, other)
        row: dict[str, Any] = {"way": way, "memory": memory, "step_seconds": device.seconds(step.flops, step.calls)}
        if other.training.prefix_cache is not None and isinstance(model, ZippedTowers):
            row["kept"] = _kept(model, other, lengths)
        made.append(row)
    return made


def _modes(recipe: FuseRecipe) -> dict[str, PrefixMode]:
    """The towers whose states a prefix cache could keep. Raises `ValueError` as `modes_of`."""
    return modes_of("memory", recipe.towers, recipe.training.corrupt)


def _can_keep(recipe: FuseRecipe) -> bool:
    try:
        _modes(recipe)
    except ValueError:
        return False
    return not (recipe.training.interleave or recipe.training.join)


def _kept(model: ZippedTowers, recipe: FuseRecipe, lengths: Lengths) -> int | None:
    """Bytes of all states that the prefix cache keeps on the host; `None`: the number of rows is not known."""
    if lengths.count is None:
        return None
    size = 0.0
    for name in _modes(recipe):
        tower, depths = model.tower(name), prefix_depths(model, name)
        mean = sum(row.get(name, 0) + 2 for row in lengths.rows) / len(lengths.rows)
        bytes_each = tower.backbone.dtype.itemsize
        size += lengths.count * mean * len(depths) * tower.hidden_size * bytes_each
    return round(size)


def _largest_unit(model: Writer) -> int:
    """Bytes of the largest part that FSDP2 gathers at once, of what is trained."""
    if not isinstance(model, ZippedTowers):
        return sum(p.nbytes for p in model.parameters())
    sizes = [sum(p.nbytes for p in unit.parameters() if p.requires_grad) for unit in units(model)]
    root = sum(p.nbytes for p in model.parameters() if p.requires_grad) - sum(sizes)
    return max(*sizes, root)
