"""The same training in one process and in several, whole in each (DDP) or spread over them (FSDP2), by plain torch.

A module of its own: processes that are spawned import it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny import doc, open_gates, tiny_model
from tiny_shared import fail_together, work_together
from tiny_steps import DOCUMENTS, Documents, join
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from zipper_lm import Document
from zipper_lm.data.collation import collate
from zipper_lm.fusion.sharding import shard
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.training.trainer import ZipperTrainer
from zipper_lm.utils.shards import fill, is_sharded, whole

ACCUMULATED = 2
STEPS = {"full": 3, "lora": 3, "frozen": 1}
"""Beside a bfloat16 tower the first one is compared: what differs by the order of sums then is rounded to another of
its states, so that later steps part, as they do in one process whose weights are moved by 2e-7."""
PATIENCE = timedelta(seconds=60)
"""After which a process that waits for another one fails."""

_ALONE = [doc(("text", [5, 6]), target=True), doc(("text", [9, 4, 11]), target=True)]
# Of two processes, one has a batch without any speech while the other's has some.
DOCS = [*DOCUMENTS, *_ALONE, *DOCUMENTS[2:]]

Found = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]
"""Losses of the steps; by name, gradients of the last one, and weights."""


def full() -> ZipperModel:
    """Both towers are trained."""
    return _drawn(train={"text": "full", "speech": "full"}, loss_weights={"speech": 0.6})


def frozen() -> ZipperModel:
    """Zips and projections are trained beside frozen towers, one of which is bfloat16."""
    model = _drawn()
    model.tower("text").backbone.to(torch.bfloat16)
    return model


def lora() -> ZipperModel:
    """One tower has adapters, the other is trained, with checkpoints of its activations."""
    model = _drawn(train={"text": "lora", "speech": "full"})
    model.gradient_checkpointing_enable()
    return model


MODELS: dict[str, Callable[[], ZipperModel]] = {"full": full, "frozen": frozen, "lora": lora}


def _drawn(**how: Any) -> ZipperModel:
    model = tiny_model(gate=0.5, kinds={"speech": "qwen3"}, **how)  # without dropout
    open_gates(model, 0.5)
    return model.train()


def trained(kind: str, wrap: str, rank: int = 0, world: int = 1) -> tuple[Found, ZipperModel]:
    """Some steps of `DOCS`, each in `ACCUMULATED` batches a process.

    Args:
        kind: in `MODELS`. wrap: ``"ddp"`` or ``"fsdp"``; ``"none"``: one process goes through the batches of all.
    """
    model = MODELS[kind]()
    called: Any = model
    if wrap == "ddp":
        called = DistributedDataParallel(model, find_unused_parameters=True)
    elif wrap == "fsdp":
        shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    counts = {name: torch.tensor(number) for name, number in _counts(model).items()}
    losses, gradients = [], dict[str, Tensor]()
    own = [(at, each) for at in range(ACCUMULATED) for each in (range(world) if wrap == "none" else [rank])]
    # Of the same documents in each: what bfloat16 rounds depends on the padding beside it.
    batches = [(collate(_share(at, each, world), model.specials), (at, each) != own[-1]) for at, each in own]
    for _ in range(STEPS[kind]):
        optimizer.zero_grad()
        loss = torch.zeros(())
        for batch, more in batches:
            with _accumulating(called, wrap, more):
                part = called(batch, target_counts=counts, return_logits=False).loss
                (part * (1 if wrap == "none" else world)).backward()  # over which gradients are averaged
            loss += part.detach()
        if wrap != "none":
            dist.all_reduce(loss)
        losses.append(float(loss))
        named = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        gradients = {name: grad.clone() for name, grad in named.items() if grad.any()}
        optimizer.step()
    weights = {n: whole(p.detach()).clone() for n, p in model.named_parameters()}
    return (losses, gradients, weights), model


def _share(at: int, rank: int, world: int) -> list[Document]:
    """The documents of one batch of a step."""
    size = len(DOCS) // (world * ACCUMULATED)
    begin = (at * world + rank) * size
    return DOCS[begin : begin + size]


def _counts(model: ZipperModel) -> dict[str, int]:
    return {name: int(number) for name, number in model.target_counts(collate(DOCS, model.specials)).items()}


@contextmanager
def _accumulating(called: Any, wrap: str, more: bool) -> Iterator[None]:
    if wrap == "fsdp":
        called.set_requires_gradient_sync(not more)
    with called.no_sync() if wrap == "ddp" and more else nullcontext():
        yield


class _OnACpu(ZipperTrainer):
    """Accelerate spreads models over accelerators only: here its state says what it would say there."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            state = self.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True


def by_trainer(
    folder: Path, world: int, resumed: bool = False, **arguments: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of four steps and the weights after them; there is a checkpoint after the second.

    Args:
        folder: for checkpoints. resumed: from there. arguments: such as `fsdp`.
    """
    given = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.05,
        optim="sgd",
        optim_args="momentum=0.9",
        lr_scheduler_type="constant",
        per_device_train_batch_size=2 // world,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=True,
        **arguments,
    )
    model = full()
    trainer = _OnACpu(model, given, Documents(DOCUMENTS), score=_score)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resumed else None)
    assert is_sharded(model) == bool(arguments.get("fsdp"))
    weights = {n.removeprefix("module."): whole(p.detach()).clone() for n, p in model.named_parameters()}
    assert {entry["eval_length"] for entry in trainer.state.log_history if "eval_length" in entry} <= {1.0, 2.0, 3.0}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], weights


def _score(model: Any) -> dict[str, float]:
    """Each process writes; the first one's is what counts."""
    written = model.generate([doc(("speech", [5, 6, 7]))], ["text"], settings={"text": {"max_new_tokens": 3}})
    return {"length": float(len(written[0][-1].ids))}


def in_a_process(rank: int, world: int, port: int, folder: str, workshop: str) -> None:
    """What each process does: shares work, trains all of `MODELS` in both ways, and writes, saves and loads."""
    join(rank, world, port)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=PATIENCE)
    shared = json.dumps([*work_together(Path(workshop)), fail_together()])
    (Path(folder) / f"{rank}.json").write_text(shared)
    done = {(kind, wrap): trained(kind, wrap, rank, world) for kind in MODELS for wrap in ("ddp", "fsdp")}
    found = {key: made for key, (made, _) in done.items()}
    place, model = Path(folder), done["full", "fsdp"][1]
    settings: dict[str, Any] = {"settings": {"text": {"max_new_tokens": 5}}}
    # Each process has other documents, and as many as it likes.
    given = [doc(("speech", [5 + rank, 6, 7]))] * (rank + 1)
    written = [d[-1].ids for d in model.eval().generate(given, ["text"], **settings)]
    model.save_pretrained(place / "saved", card=False)
    model.save_pretrained(place / "with_card")
    assert is_sharded(model)
    with torch.no_grad():
        for parameter in model.parameters():
            fill(parameter, torch.zeros(parameter.shape))
    dist.barrier()
    model.load_own(place / "saved" / "model.safetensors")
    again = {n: whole(p.detach()) for n, p in model.named_parameters()}
    runs = [] if world > 2 else [by_trainer(place / "run", world, resumed, fsdp=True) for resumed in (False, True)]
    torch.save((found, written, again, runs), place / f"{rank}.pt")
    dist.destroy_process_group()
