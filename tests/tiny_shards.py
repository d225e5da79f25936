"""The same training in one process and in several, whole in each (DDP) or spread over them (FSDP2), by plain torch.

A module of its own: processes that are spawned import it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import doc, open_gates, tiny_model
from tiny_shared import fail_together, work_together
from tiny_steps import DOCUMENTS, Documents, free_port, join, lettered
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from zipper_lm import Document
from zipper_lm.data.collation import collate, with_every_tower
from zipper_lm.evaluation.preservation import verify
from zipper_lm.fusion.sharding import shard
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.training.trainer import ZipperTrainer
from zipper_lm.utils.processes import is_main
from zipper_lm.utils.shards import fill, is_sharded, whole

STEPS = 20
PATIENCE = timedelta(seconds=120)
"""After which a process that waits for another one fails."""
LIMIT = 1800.0
"""Seconds after which processes that wait for each other are ended."""


@dataclass(frozen=True)
class Way:
    """What is trained, and how it is laid out over processes.

    Attributes:
        model: in `MODELS`. wrap: ``"ddp"``, ``"fsdp"``, or ``"fsdp of all"``: of frozen towers, too.
        accumulated: batches of a step in each process.
    """

    model: str
    wrap: str
    accumulated: int = 2

    def __str__(self) -> str:
        return f"{self.model}, {self.wrap}, {self.accumulated} accumulated"


_ALONE = [doc(("text", [5, 6]), target=True), doc(("text", [9, 4, 11]), target=True)]
# Of two processes, one has a batch without any speech while the other's has some.
DOCS = [*DOCUMENTS, *_ALONE, *DOCUMENTS[2:]]

Found = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]
"""Losses of steps; by name, gradients of the last one, and weights after it."""
Run = list[Found]
"""All steps at once; or each by itself, where a run `parts_by_rounding`."""
Batches = list[list[Any]]
"""Of a step, by process."""


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


def three() -> ZipperModel:
    """Three towers of which no batch has all."""
    return _drawn(towers=3, train={"text": "full", "image": "full"})


MODELS: dict[str, Callable[[], ZipperModel]] = {
    "full": full,
    "frozen": frozen,
    "lora": lora,
    "three": three,
    "mixed": full,  # by autocast
}
MATRIX = [Way(model, wrap) for model in MODELS for wrap in ("ddp", "fsdp")]
MATRIX += [Way(model, "fsdp of all") for model in ("frozen", "lora")]
MATRIX += [Way("full", wrap, accumulated=1) for wrap in ("ddp", "fsdp")]
SAMPLE = [Way("full", "fsdp"), Way("lora", "ddp", accumulated=1), Way("frozen", "ddp", accumulated=1)]


def _drawn(towers: int = 2, **how: Any) -> ZipperModel:
    model = tiny_model(towers, gate=0.5, kinds={"speech": "qwen3"}, **how)  # without dropout
    open_gates(model, 0.5)
    return model.train()


def trained(way: Way, rank: int, world: int) -> tuple[Run, ZipperModel]:
    """Some steps of `DOCS`, in one of several processes."""
    model = MODELS[way.model]()
    called: Any = model
    if way.wrap == "ddp":
        called = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        shard(model, mesh=init_device_mesh("cpu", (world,)), frozen=way.wrap.endswith("of all"))

    def gradients(batches: Batches, counts: dict[str, Tensor]) -> float:
        loss = torch.zeros(())
        for at, batch in enumerate(batches[rank]):
            more = at < way.accumulated - 1
            if way.wrap != "ddp":
                called.set_requires_gradient_sync(not more)
            with called.no_sync() if way.wrap == "ddp" and more else nullcontext(), _precision(way):
                part = called(batch, target_counts=counts, return_logits=False).loss
            (part * world).backward()  # over which gradients are averaged
            loss += part.detach()
        dist.all_reduce(loss)
        return float(loss)

    return _steps(way, model, world, gradients, apart=parts_by_rounding(way, world)), model


_OF_MEMORY = ("memory_projection", "memory_position_scale", "k_proj", "v_proj")
"""What a zip remembers with. FSDP sends the gradients that a zip has when its attention's are there: of these, those of
the batches before the last one then, and the last one's by themselves."""


def trained_alone(way: Way, world: int, lead: Run | None = None, last_first: bool = False) -> Run:
    """The same steps in one process, which adds gradients up as so many processes do: those of the batches of each, and
    then these.

    Args:
        way, world: as there. lead: a run of which each step is by itself: each step begins with its weights.
        last_first: add those of the last process up first.
    """
    model = MODELS[way.model]()
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    apart = {n for n in ours if way.wrap != "ddp" and n.startswith("zips.") and set(_OF_MEMORY) & set(n.split("."))}

    def gradients(batches: Batches, counts: dict[str, Tensor]) -> float:
        total, sums, before = torch.zeros(()), dict[str, Tensor](), dict[str, Tensor]()
        for of_one in batches[::-1] if last_first else batches:
            loss = torch.zeros(())
            model.zero_grad()
            for at, batch in enumerate(of_one):
                if at == len(of_one) - 1:
                    _add({n: ours[n] for n in apart}, before)
                if way.wrap != "ddp":
                    batch = with_every_tower(batch, model.specials)
                with _precision(way):
                    part = model(batch, target_counts=counts, return_logits=False).loss
                part.backward()
                loss += part.detach()
            total += loss
            _add(ours, sums)
        for name, parameter in ours.items():
            parts = [each[name] for each in (before, sums) if name in each]
            parameter.grad = sum(parts[1:], parts[0]) if parts else None
        return float(total)

    return _steps(way, model, world, gradients, apart=lead is not None, lead=lead)


def _add(parameters: dict[str, nn.Parameter], sums: dict[str, Tensor]) -> None:
    """Move gradients to sums."""
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            sums[name] = sums[name] + parameter.grad if name in sums else parameter.grad
            parameter.grad = None


def _steps(
    way: Way,
    model: ZipperModel,
    world: int,
    gradients: Callable[[Batches, dict[str, Tensor]], float],
    apart: bool,
    lead: Run | None = None,
) -> Run:
    """`STEPS` of SGD with momentum; `gradients` are those of a step's batches, and it gives the loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    documents = _documents(way)
    size = len(documents) // (world * way.accumulated)
    cut = [documents[at : at + size] for at in range(0, len(documents), size)]
    batches = [
        [collate(cut[at * world + rank], model.specials) for at in range(way.accumulated)] for rank in range(world)
    ]
    counts = {name: number.clone() for name, number in model.target_counts(collate(documents, model.specials)).items()}
    run, losses = Run(), list[float]()
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(gradients(batches, counts))
        last = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        if apart or step == STEPS - 1:
            weights = {n: whole(p.detach()).clone() for n, p in model.named_parameters()}
            run.append((losses, {name: grad for name, grad in last.items() if grad.any()}, weights))
            losses = []
        if lead is not None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(lead[step][2][name])
    return run


def _documents(way: Way) -> list[Document]:
    if way.model != "three":
        return DOCS
    seen = [doc(("image", [4, 5, 6]), ("text", [7, 8])), doc(("speech", [9, 4]), ("image", [11, 12]))]
    for document in seen:
        document[-1].target = True
    return [*DOCS[:6], *seen]


def _precision(way: Way) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=way.model == "mixed")


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, as a share of its norm."""
    assert found.keys() == expected.keys()
    norms = {name: max(float(tensor.norm()), 1e-6) for name, tensor in expected.items()}
    return max(float((found[name] - tensor).norm()) / norms[name] for name, tensor in expected.items())


def difference(found: Run, expected: Run) -> dict[str, float]:
    """Of one process from another: the largest ones of a loss, and of a tensor among gradients and weights."""
    most = {"loss": 0.0, "gradients": 0.0, "weights": 0.0}
    for ours, theirs in zip(found, expected, strict=True):
        losses = max(abs(one - other) / other for one, other in zip(ours[0], theirs[0], strict=True))
        here = {"loss": losses, "gradients": apart(ours[1], theirs[1]), "weights": apart(ours[2], theirs[2])}
        most = {name: max(most[name], here[name]) for name in most}
    return most


def limits(way: Way, world: int) -> dict[str, float]:
    """What processes may differ from one by, to be called equal. Two numbers add up to the same in any order, so two
    processes may not differ. The sums of four are in the order of the backend; there are tensors with gradients near
    nothing, of which a rounding is a larger share."""
    if world == 2:
        return dict.fromkeys(("loss", "gradients", "weights"), 0.0)
    return {"loss": 1e-5, "gradients": 2e-2, "weights": 1e-4}


def parts_by_rounding(way: Way, world: int) -> bool:
    """Whether two runs part though each of their steps is the same: a difference of 1e-7, which another order of sums
    makes, is rounded to another number of a bfloat16 tower, or is a larger share of adapters' gradients, which are near
    nothing. `parted` is how far one process parts from itself. Of such ways each step is compared by itself, from the
    weights that the processes had before it."""
    return world > 2 and (way.model == "frozen" or (way.model == "lora" and way.accumulated == 1))


def parted(way: Way, world: int) -> dict[str, float]:
    """What one process comes to, after all steps, apart from itself when it adds up in another order."""
    return difference(trained_alone(way, world, last_first=True), trained_alone(way, world))


def spawn(work: Callable[..., None], world: int, *given: Any) -> None:
    """Run ``work(rank, world, port, *given)`` in some processes.

    Raises:
        TimeoutError: if they do not end.
    """
    running = torch.multiprocessing.spawn(work, (world, free_port(), *given), nprocs=world, join=False)
    end = time.monotonic() + LIMIT
    while not running.join(timeout=1.0):
        if time.monotonic() > end:
            for process in running.processes:
                process.kill()
            raise TimeoutError(f"{world} processes still wait for each other after {LIMIT} s")


def begin(rank: int, world: int, port: int) -> None:
    """Be one of some processes that wait for each other for `PATIENCE`."""
    join(rank, world, port)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=PATIENCE)


def train_in_a_process(rank: int, world: int, port: int, folder: str, ways: list[Way]) -> None:
    """What each process does of a matrix."""
    begin(rank, world, port)
    torch.save({str(way): trained(way, rank, world)[0] for way in ways}, Path(folder) / f"trained-{rank}.pt")
    dist.destroy_process_group()


def compared(world: int, folder: Path, ways: list[Way]) -> dict[Way, dict[str, float]]:
    """By way, the largest differences of any of so many processes from one."""
    found = [torch.load(folder / f"trained-{rank}.pt") for rank in range(world)]
    alone: dict[Any, Run] = {}
    differences: dict[Way, dict[str, float]] = {}
    for way in ways:
        lead = found[0][str(way)] if parts_by_rounding(way, world) else None
        key = way if lead else (way.model, way.wrap == "ddp", way.accumulated)
        alone[key] = alone[key] if key in alone else trained_alone(way, world, lead)
        each = [difference(of_one[str(way)], alone[key]) for of_one in found]
        differences[way] = {name: max(one[name] for one in each) for name in each[0]}
    return differences


def by_trainer(
    folder: Path, world: int, resumed: bool = False, **arguments: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of four steps and the weights after them; there is a checkpoint after the second. Attention is looked
    at in both directions, which not every batch has.

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
        per_device_train_batch_size=max(1, 2 // world),
        gradient_accumulation_steps=4 // (max(1, 2 // world) * world),
        max_grad_norm=1.0,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=True,
        **arguments,
    )
    model = lettered(full())
    heard = "text", "speech"
    beside: dict[str, Any] = {"guided": {("speech", "text"): 2.0}, "forward_sum": {heard: 0.5}, "ctc": {heard: 0.5}}
    torch.manual_seed(1)  # of what spells
    trainer = ZipperTrainer(model, given, Documents(DOCUMENTS), score=_score, **beside)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resumed else None)
    assert is_sharded(model) == bool(arguments.get("fsdp"))
    weights = {n.removeprefix("module."): whole(p.detach()).clone() for n, p in model.named_parameters()}
    assert {entry["eval_length"] for entry in trainer.state.log_history if "eval_length" in entry} <= {1.0, 2.0, 3.0}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], weights


def _score(model: Any) -> dict[str, float]:
    """The first process alone has something to write, as with a few validation rows. With FSDP, transformers'
    `generate` waited for the others at every token, for ever."""
    if not is_main():
        return {}
    written = model.generate([doc(("speech", [5, 6, 7]))], ["text"], settings={"text": {"max_new_tokens": 3}})
    return {"length": float(len(written[0][-1].ids))}


def in_a_process(rank: int, world: int, port: int, folder: str, workshop: str) -> None:
    """What each process does: shares work, trains `SAMPLE`, and writes, saves and loads."""
    begin(rank, world, port)
    shared = json.dumps([*work_together(Path(workshop)), fail_together()])
    (Path(folder) / f"{rank}.json").write_text(shared)
    done = {way: trained(way, rank, world) for way in SAMPLE}
    torch.save({str(way): found for way, (found, _) in done.items()}, Path(folder) / f"trained-{rank}.pt")
    place, model = Path(folder), done[SAMPLE[0]][1]
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
    torch.save((written, again, runs), place / f"{rank}.pt")
    assert all(report.identical and report.tensors for report in verify(_spread(Path(workshop))))
    dist.destroy_process_group()


def _spread(workshop: Path) -> ZipperModel:
    """Frozen towers with sources, spread too."""
    model = ZipperModel.fuse({name: str(workshop / name) for name in ("text", "speech")})
    shard(model, frozen=True)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def go_on_in_a_process(rank: int, world: int, port: int, folder: str, resumed: bool) -> None:
    """What each process does of a run by Trainer, from its beginning or its second step."""
    begin(rank, world, port)
    torch.save(by_trainer(Path(folder), world, resumed, fsdp=True), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
