"""A training step, run without values by what will run it, and what it computes and holds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from zipper_lm.data.broken import Broken
from zipper_lm.data.collation import Batch
from zipper_lm.data.mixture import TaskMixture
from zipper_lm.data.tasks import Task
from zipper_lm.fusion.interface import embedding_of
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.prefix import prefix_depths
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.cost.lengths import Lengths, join_ids, make_rows
from zipper_lm.jobs.fuse import make_trainer
from zipper_lm.jobs.materials import Materials, Plan
from zipper_lm.jobs.recipes.checks import joined_tasks
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.training.arguments import training_arguments
from zipper_lm.training.ctc import MOST_PLACES
from zipper_lm.training.prefix_store import PrefixStore
from zipper_lm.training.trainer import ZipperTrainer
from zipper_lm.utils.counting import Counting

BATCHES, MEGABATCH = 3, 16
"""Batches that are counted, of the documents of so many."""

LETTERS = 4
"""Assumed of a token that joint CTC spells: English text, a large vocabulary. A step's cost hardly depends on it."""

_ELSEWHERE = ("fsdp", "fsdp_config", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode")
"""Fields of training.arguments that change how fast a step is or where it is, and that a CPU does not take."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one optimizer step in one process costs.

    Attributes:
        flops: by name of the dtype that is computed in; of all batches that are accumulated, the mean over batches.
        calls: operations, however large, of all batches, the mean; and the optimizer's.
        tokens: of the streams, padding included, the mean. longest: documents and tokens of the longest batch.
        activations: bytes that the longest batch adds to weights, gradients and optimizer, at the most. growth: bytes
            of it a document, if all gradients are there meanwhile.
        gradients, optimizer: bytes. update: bytes that the optimizer's step adds to all these.
    """

    flops: dict[str, float]
    calls: float
    tokens: float
    longest: tuple[int, int]
    activations: int
    growth: float
    gradients: int
    optimizer: int
    update: int

    @property
    def beside_weights(self) -> int:
        """Bytes at the most."""
        return self.gradients + self.optimizer + max(self.activations, self.update)


class _AnyText:
    """In place of a codec that makes text, for losses that spell it.

    Args:
        vocab_size: of its tower. source, target: tokens of all rows that are read, and of those that are written.
    """

    def __init__(self, vocab_size: int, source: int, target: int) -> None:
        self.vocab_size = vocab_size
        self.letters = max(1, min(LETTERS, MOST_PLACES * source // max(1, target)))

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """For each token `LETTERS`, or as many as there is a place for: what is not known shall not be refused."""
        return [("ab" * len(ids) * LETTERS)[: self.letters * len(ids)] for ids in rows]


class _AnyStates(PrefixStore):
    """In place of states that are kept: those of any stream, without being computed."""

    def of(self, key: bytes) -> torch.Tensor:
        """A number, which fills any shape."""
        return torch.zeros((), dtype=self.dtype)


def count_step(model: Writer, recipe: FuseRecipe, tasks: Mapping[str, Task], lengths: Lengths) -> Step:
    """Count a step of a recipe's training.

    Args:
        model: of the recipe, with values or without. tasks: by template. lengths: of its rows.

    Raises:
        ValueError: as `ZipperTrainer`, for what cannot be trained; if there is no document.
    """
    accumulated = int(recipe.training.arguments.get("gradient_accumulation_steps", 1))
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, recipe, tasks, lengths, Path(folder))
        batches = [inputs["batch"] for inputs in trainer.get_train_dataloader()]
        chosen = _unlike(batches)
        counted = [_count(trainer, batch, accumulated > 1) for batch in chosen]
        dtypes = set().union(*(each.flops for each in counted))
        flops = {dtype: sum(each.flops[dtype] for each in counted) / len(counted) for dtype in dtypes}
        gradients = sum(p.nbytes for p in _trained(trainer))
        # Without accumulation they come to be while activations go, and are in the peak already.
        activations = max(0, counted[0].peak - (0 if accumulated > 1 else gradients))
        optimizer, updating = _count_update(trainer)
        calls = accumulated * sum(each.calls for each in counted) / len(counted) + updating.calls
    return Step(
        flops={str(dtype).removeprefix("torch."): accumulated * count for dtype, count in flops.items()},
        calls=calls,
        tokens=accumulated * sum(batch.numel() for batch in batches) / len(batches),
        longest=(len(next(iter(chosen[0].values()))["input_ids"]), chosen[0].numel()),
        activations=activations,
        growth=counted[0].peak_beside / len(next(iter(chosen[0].values()))["input_ids"]),
        gradients=gradients,
        optimizer=optimizer,
        update=updating.peak,
    )


def _trainer(
    model: Writer, recipe: FuseRecipe, tasks: Mapping[str, Task], lengths: Lengths, folder: Path
) -> ZipperTrainer:
    training = recipe.training
    if training.arguments.get("fp16"):  # a loss is scaled there, which needs its value; bfloat16 is as wide
        training = replace(training, arguments={**training.arguments, "fp16": False, "bf16": True})
    kept = {name: value for name, value in training.arguments.items() if name not in _ELSEWHERE}
    training = replace(training, arguments={**kept, "use_cpu": True, "report_to": [], "dataloader_num_workers": 0})
    recipe = replace(recipe, training=training)
    rows = make_rows(model, lengths, MEGABATCH * training.batch_size, recipe.seed, documents=not recipe.tasks)
    joined = {modality for template in joined_tasks(recipe) for modality in tasks[template].modalities}
    mixture = TaskMixture(
        rows,
        recipe.tasks,
        seed=recipe.seed,
        interleave=training.interleave,
        join=training.join,
        how=dict.fromkeys(joined, join_ids),
        towers=model.names,
    )
    plan = Plan(
        recipe=recipe,
        given=recipe,
        tasks=dict(tasks),
        trained=list(tasks),
        working=folder,
        arguments=training_arguments(training, folder, recipe.seed),
        checkpoint=None,
        halted=[],
    )
    materials = Materials(
        model=model,
        mixture=mixture,
        rows=rows,
        validation=[],
        labelled=[],
        pairs=len(rows),
        broken=Broken(),
        scorer=None,
    )
    if training.ctc:
        pairs = [tasks[template].modalities for template in training.ctc]
        tokens = {m: sum(row.get(m, 0) for row in lengths.rows) for m in model.names}
        sizes = {name: cast(ZippedTowers, model).tower(name).vocab_size for name in model.names}
        texts = {target: _AnyText(sizes[target], tokens[source], tokens[target]) for source, target in pairs}
        cast(Any, model).processor = SimpleNamespace(codecs=texts)
    module = cast(nn.Module, model)
    module.to = lambda *_, **__: module  # type: ignore[method-assign]
    try:
        trainer = make_trainer(plan, materials)  # which would move it: without values it is nowhere
    finally:
        del module.to
    for name in trainer.kept:
        tower = cast(ZippedTowers, model).tower(name)
        depths, dtype = prefix_depths(cast(ZippedTowers, model), name), embedding_of(tower.backbone).dtype
        trainer.prefixes.stores[name] = _AnyStates(len(depths), tower.hidden_size, dtype)
    if trainer.args.gradient_checkpointing:
        how = trainer.args.gradient_checkpointing_kwargs
        cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    cast(nn.Module, model).train()
    return trainer


def _run(trainer: ZipperTrainer, batch: Batch) -> None:
    """Forward and backward, as in training; gradients stay."""
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, {"batch": batch})
    loss.backward()


def _unlike(batches: Sequence[Batch]) -> list[Batch]:
    """The longest batch, which comes first, and some of another size, if there are."""
    sizes = {tuple((name, side["input_ids"].shape) for name, side in batch.items()): batch for batch in batches[::-1]}
    others = [batch for batch in sizes.values() if batch is not batches[0]]
    return [batches[0], *others[:: max(1, len(others) // (BATCHES - 1))][: BATCHES - 1]]


def _count(trainer: ZipperTrainer, batch: Batch, accumulated: bool) -> Counting:
    """Forward and backward of a batch; `accumulated`: the gradients of others are there."""
    module, trained = cast(nn.Module, trainer.model), _trained(trainer)
    module.zero_grad()
    for parameter in trained if accumulated else ():
        parameter.grad = torch.zeros_like(parameter)
    there = [p.grad for p in trained if p.grad is not None]
    with ExitStack() as stack:
        counting = stack.enter_context(Counting([*module.parameters(), *module.buffers(), *there]))
        for parameter in trained:
            hook = parameter.register_post_accumulate_grad_hook(lambda p: counting.set_aside(p.grad))
            stack.callback(hook.remove)
        _run(trainer, batch)
    return counting


def _count_update(trainer: ZipperTrainer) -> tuple[int, Counting]:
    """Bytes of the optimizer's state, and its second step."""
    module = cast(nn.Module, trainer.model)
    optimizer = trainer.create_optimizer()
    optimizer.step()
    state = [t for of in optimizer.state.values() for t in of.values() if isinstance(t, torch.Tensor)]
    there: Sequence[Any] = [p.grad for p in module.parameters() if p.grad is not None]
    with Counting([*module.parameters(), *module.buffers(), *there, *state]) as counting:
        optimizer.step()
    module.zero_grad()
    return sum(t.nbytes for t in state), counting


def _trained(trainer: ZipperTrainer) -> list[nn.Parameter]:
    return [p for p in cast(nn.Module, trainer.model).parameters() if p.requires_grad]
