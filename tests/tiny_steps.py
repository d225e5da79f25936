"""The gradient of one optimizer step, however its documents are cut: by accumulation, by processes, or by both.

A module of its own: processes that are spawned import it.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_backbone, tiny_model
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainingArguments

from zipper_lm import Document, Segment
from zipper_lm.generation.writer import Writer
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.training.base import IDLE, BaseTrainer
from zipper_lm.training.trainer import ZipperTrainer

Step = tuple[dict[str, torch.Tensor], dict[str, float]]
"""Gradients by name, and what is logged of the losses."""

GUIDED = {("speech", "text"): 2.0}


def spoken(text: list[int], speech: list[int], reads: bool) -> Document:
    """One document of speech to text, or of text to speech."""
    segments = [Segment("speech", ids=speech), Segment("text", ids=text)]
    first, last = segments if reads else reversed(segments)
    return Document([first, Segment(last.modality, ids=last.ids, target=True)])


# As one document a batch, no batch has both modalities; of two a batch, the first one has both, the second one has not.
DOCUMENTS = [
    spoken([4, 9], [5, 6, 7] * 4, reads=False),
    spoken([4, 9, 11, 12, 13], [5, 6, 7, 8], reads=True),
    spoken([12], [9, 6, 7], reads=True),
    spoken([14, 12, 5], [9, 6], reads=True),
]


class Documents(Dataset[Document]):
    """Some documents; what was asked for is `read`."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        self.read.append(index)
        return self.documents[index]


class _InOrder(ZipperTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class _Look(TrainerCallback):
    def __init__(self, trainer: ZipperTrainer) -> None:
        self.trainer, self.gradients = trainer, dict[str, torch.Tensor]()

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
        if self.trainer.spelling is not None:
            found |= {f"spelling.{n}": p.grad for n, p in self.trainer.spelling.named_parameters()}
        self.gradients = {n: grad.clone() for n, grad in found.items() if grad is not None and grad.any()}


def one_step(
    batch: int,
    accumulated: int,
    model: Writer | None = None,
    documents: list[Document] = DOCUMENTS,
    guided: dict[tuple[str, str], float] | None = None,
    packing: bool = False,
    beside: dict[str, Any] | None = None,
    **arguments: Any,
) -> Step:
    """Gradients of the one step, and what is logged of it.

    Args:
        batch: documents a batch and process. accumulated: batches. model: a zipper in training if it is not given.
        documents: of the step. guided: as of the trainer; of a model that is not given, `GUIDED`. packing: as there.
        beside: further arguments of the trainer.
    """
    guided = guided or (GUIDED if model is None else {})
    if model is None:
        kinds = {"speech": "qwen3"}  # without dropout
        model = tiny_model(
            gate=0.5, kinds=kinds, train={"text": "full", "speech": "full"}, loss_weights={"speech": 0.6}
        )
    given = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        **arguments,
    )
    trainer = _InOrder(model, given, Documents(documents), guided=guided, packing=packing, **(beside or {}))
    trainer.add_callback(look := _Look(trainer))  # behind its own
    trainer.train()
    return look.gradients, {n: v for n, v in trainer.state.log_history[0].items() if n.startswith("loss")}


def letters(ids: Sequence[Sequence[int]]) -> list[str]:
    """A capital letter for each id."""
    return ["".join(chr(ord("A") + i) for i in row) for row in ids]


def lettered(model: ZipperModel, decode: Callable[[Any], Any] = letters) -> ZipperModel:
    """A model of which the text tower's ids are letters."""
    codec = SimpleNamespace(decode=decode, vocab_size=31)
    model.processor = SimpleNamespace(codecs={"text": codec}, save_pretrained=lambda folder: None, encode=list)  # type: ignore
    return model


def spelled_step(batch: int, accumulated: int, documents: list[Document] = DOCUMENTS, packing: bool = False) -> Step:
    """`one_step` with joint CTC, whose heads are drawn alike."""
    towers: dict[str, Any] = {"text": "full", "speech": "full"}
    model = lettered(tiny_model(gate=0.5, kinds={"speech": "qwen3"}, train=towers))
    torch.manual_seed(1)
    beside = {"ctc": {("text", "speech"): 2.0}}
    return one_step(batch, accumulated, model, documents, packing=packing, beside=beside)


def check_same(found: Step, whole: Step) -> None:
    """Fail where gradients or losses differ by more than the order in which numbers are added."""
    assert found[0].keys() == whole[0].keys()
    for name, gradient in whole[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-5, msg=f"{name} differs")
    assert found[1] == pytest.approx(whole[1], abs=2e-4)


def check_as_near_as_it_rounds(found: Step, whole: Step, exact: Step) -> None:
    """Fail where two steps in bfloat16 differ by more than bfloat16 makes of a step in float32.

    A tensor of one number, whose gradient is a sum of what nearly cancels, has lost most of its digits: how many is the
    processor's. So no tensor is held to a share of itself alone.

    Args:
        found, whole: in bfloat16. exact: in float32.
    """
    total = torch.cat([gradient.flatten() for gradient in exact[0].values()]).norm()
    assert found[0].keys() == whole[0].keys() == exact[0].keys()
    for name, gradient in whole[0].items():
        lost = (gradient - exact[0][name]).norm()
        allowed = max(0.05 * gradient.norm(), lost, 1e-4 * total)
        apart = (found[0][name] - gradient).norm()
        assert apart <= allowed, f"{name}: {apart:.3g} apart, {allowed:.3g} allowed, of {gradient.norm():.3g}"
    assert found[1] == pytest.approx(whole[1], abs=0.02)


def in_a_process(rank: int, port: int, folder: str) -> None:
    """What each of two processes does: two documents at once, and one after the other."""
    join_two(rank, port)
    found = [one_step(2, 1), one_step(1, 2), spelled_step(2, 1)]
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def losses_of_two_epochs(trainer: str, folder: Path, resumed: bool) -> list[float]:
    """The loss of each of six steps, three an epoch with two processes; there is a checkpoint after the fourth.

    Args:
        trainer: ``"fusion"`` or ``"tower"``. folder: for checkpoints. resumed: from there.
    """
    given = TrainingArguments(
        str(folder / trainer),
        max_steps=6,
        save_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=True,
    )
    torch.manual_seed(0)
    made: BaseTrainer
    if trainer == "fusion":
        more = [Document([*d, Segment("text", ids=[7] * n)]) for n in (3, 4) for d in DOCUMENTS]
        made = ZipperTrainer(tiny_model(gate=0.5, train={"speech": "full"}), given, Documents(DOCUMENTS + more))
    else:
        rows = [{"input_ids": [n, n + 1, n + 2], "labels": [n, n + 1, n + 2]} for n in range(3, 15)]
        made = BaseTrainer(model=tiny_backbone("qwen3", 20), args=given, train_dataset=rows)
    made.train(resume_from_checkpoint=str(folder / trainer / "checkpoint-4") if resumed else None)
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def join_two(rank: int, port: int) -> None:
    """Be one of two processes."""
    join(rank, 2, port)


def join(rank: int, world: int, port: int) -> None:
    """Be one of some processes."""
    torch.set_num_threads(1)
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in told.items()} | {"ACCELERATE_USE_CPU": "true"})


def resume_in_a_process(rank: int, port: int, folder: str) -> None:
    """What each of two processes does: a run, and once more from the midst of its second epoch."""
    join_two(rank, port)
    found = {
        name: [losses_of_two_epochs(name, Path(folder), resumed) for resumed in (False, True)]
        for name in ("fusion", "tower")
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


NUMBERED = [spoken([4 + n, 9], [5 + n, 6, 7, 8, 9, 10, 11, 12, 13], reads=True) for n in range(7)]
"""Documents that are told apart by their ids."""


def order_of(folder: Path, world: int, workers: int, until: int, resumed: int = 0) -> dict[str, Any]:
    """What one process reads in each step of two epochs of `NUMBERED`, four documents a step, and the losses.

    Args:
        folder: for checkpoints. world: processes. workers: that read. until: the last step.
        resumed: the step of a checkpoint to go on from.
    """
    read: list[list[str]] = []

    class Told(ZipperTrainer):
        def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
            batches, counts = super().get_batch_samples(*args)
            taken = [each["batch"] for each in batches if IDLE not in each]
            rows = [(b[name]["input_ids"], b[name]["attention_mask"]) for b in taken for name in ("speech", "text")]
            read.append([str(ids[mask == 1].tolist()) for pair in rows for ids, mask in zip(*pair)])
            return batches, counts

    given = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4 // world,
        learning_rate=1e-2,
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        use_cpu=True,
        dataloader_num_workers=workers,
    )
    model = tiny_model(gate=0.5, kinds={"speech": "qwen3"}, train={"text": "full", "speech": "full"})
    trainer = Told(model, given, Documents(NUMBERED), corrupt=0.3, history_dropout=0.3)
    trainer.add_callback(_StopAfter(until))
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resumed}") if resumed else None)
    return {"read": read, "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


class _StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


def order_in_a_process(rank: int, world: int, port: int, folder: str, how: list[dict[str, int]]) -> None:
    """What each of some processes does: `order_of`, in some ways."""
    join(rank, world, port)
    found = [order_of(Path(folder), world, **each) for each in how]
    (Path(folder) / f"{rank}-of-{world}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
