"""Which documents share a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from tiny import tiny_model
from tiny_steps import DOCUMENTS, free_port, order_in_a_process, order_of
from tiny_steps import Documents as DatasetOf
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from zipper_lm import Document, Segment
from zipper_lm.data.collation import Specials, collate
from zipper_lm.data.mixture import TaskMixture
from zipper_lm.training.base import IDLE
from zipper_lm.training.corruption import CorruptedDocuments
from zipper_lm.training.order import Evened, LikeLengths, grouped
from zipper_lm.training.trainer import ZipperTrainer

SPECIALS = {"text": Specials(0, 1, 2), "speech": Specials(0, 1, 2)}


class Documents:
    """Documents of given lengths, which are others in another epoch."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.found, self.epoch = lengths, 0

    def __len__(self) -> int:
        return len(self.found)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def lengths(self) -> np.ndarray:
        return self.found + self.epoch * np.arange(len(self.found))


@pytest.mark.parametrize("count", [1, 3, 4, 15, 16, 64, 199, 1000, 1003])
@pytest.mark.parametrize("batch", [1, 4])
def test_the_order_is_that_of_transformers(count: int, batch: int) -> None:
    lengths = np.random.default_rng(count).integers(5, 30, count)
    theirs = get_length_grouped_indices(lengths.tolist(), batch, generator=torch.Generator().manual_seed(3))
    assert grouped(lengths, batch, torch.Generator().manual_seed(3)).tolist() == theirs


def test_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 50, 64)
    sampler = LikeLengths(Documents(lengths), 4, seed=3)
    first = list(sampler)
    assert len(sampler) == 64
    assert sorted(first) == list(range(64))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    spread = np.mean([np.ptp([lengths[i] for i in first[k : k + 4]]) for k in range(0, 64, 4)])
    assert spread < 0.5 * np.mean([np.ptp(lengths[k : k + 4]) for k in range(0, 64, 4)])


def padding(documents: CorruptedDocuments, order: list[int]) -> float:
    empty = tokens = 0
    for start in range(0, len(order), 8):
        for stream in collate([documents[i] for i in order[start : start + 8]], SPECIALS).values():
            empty += int((stream["attention_mask"] == 0).sum())
            tokens += stream["attention_mask"].numel()
    return empty / tokens


def test_batches_are_alike_in_every_epoch() -> None:
    """Lengths were those of the first epoch's draw, and of the longest segment in place of the streams: where a second
    row follows in some documents, batches of later epochs held more padding than sound."""
    draw = np.random.default_rng(0)
    rows = [
        {"speech": Segment("speech", ids=[5] * int(n)), "text": Segment("text", "x", [4] * int(n // 8))}
        for n in draw.integers(20, 400, 512)
    ]
    mixture = TaskMixture(rows, {"speech->text": 1}, interleave=0.5)
    documents = CorruptedDocuments(mixture, SPECIALS, corrupt=0.0, history_dropout=0.0, sizes={}, seed=0)
    sampler = LikeLengths(documents, 8, seed=0)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert padding(documents, list(sampler)) < 0.12


def test_documents_that_do_not_know_their_lengths_are_measured() -> None:
    whole = [Document([Segment("text", ids=[4] * 3), Segment("speech", ids=[4]), Segment("text", ids=[4])])] * 2
    documents = CorruptedDocuments(whole, SPECIALS, corrupt=0.0, history_dropout=0.0, sizes={}, seed=0)  # type: ignore[arg-type]
    assert documents.lengths().tolist() == [8, 8]


def seen(
    count: int, batch: int, accumulated: int, world: int, workers: int, begin: int = 0, drop_last: bool = False
) -> list[set[int]]:
    """The documents of each step of two epochs, from step `begin` on, as accelerate deals them to processes."""
    step, found = batch * accumulated * world, list[set[int]]()
    lengths = np.random.default_rng(0).integers(5, 50, count)
    per_epoch = count // step if drop_last else -(-count // step)
    epoch, first = divmod(begin, per_epoch)
    for now in range(epoch, 2):
        of_processes = []
        for rank in range(world):
            sampler = Evened(
                LikeLengths(Documents(lengths), step, seed=3),
                together=batch * world if world > 1 else 1,
                step=step,
                drop_last=drop_last,
            )
            loader: Any = DataLoader(
                Numbers(count), batch, sampler=sampler, num_workers=workers, drop_last=drop_last, collate_fn=list
            )
            loader = prepare_data_loader(loader, num_processes=world, process_index=rank, put_on_device=False)
            loader.set_epoch(now)
            of_processes.append(list(skip_first_batches(loader, first * accumulated) if now == epoch else loader))
        assert len({len(loaded) for loaded in of_processes}) == 1, "processes would wait for each other"
        for at in range(0, len(of_processes[0]), accumulated):
            numbers = [n for loaded in of_processes for taken in loaded[at : at + accumulated] for n in taken if n >= 0]
            assert len(set(numbers)) == len(numbers), "a document was dealt twice"
            found.append(set(numbers))
        first = 0
    return found


class Numbers(Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("count", [8, 29, 33, 40])
@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_have_the_same_documents_on_any_number_of_processes(count: int, drop_last: bool) -> None:
    """Where the documents of an epoch did not go up in its steps, accelerate gave its first ones to processes that had
    none left once more: on one process, on two and on four, others were seen twice."""
    alone = seen(count, 8, 1, world=1, workers=0, drop_last=drop_last)
    kept = count // 8 * 8 if drop_last else count
    assert [len(step) for step in alone] == ([8] * (kept // 8) + [kept % 8] * bool(kept % 8)) * 2
    per_epoch = len(alone) // 2
    assert len(set.union(*alone[:per_epoch])) == len(set.union(*alone[per_epoch:])) == kept
    for batch, accumulated, world in ((4, 2, 1), (4, 1, 2), (2, 2, 2), (2, 1, 4), (1, 2, 4)):
        for begin in (0, per_epoch - 1, per_epoch, 2 * per_epoch - 1):  # resumed there, whoever ran before
            assert seen(count, batch, accumulated, world, 0, begin, drop_last) == alone[begin:], (batch, world, begin)


def test_steps_have_the_same_documents_with_any_number_of_workers() -> None:
    alone = seen(29, 8, 1, world=1, workers=0)
    for workers, world, begin in ((2, 1, 0), (2, 2, 2)):
        assert seen(29, 8 // world, 1, world, workers, begin) == alone[begin:]


def test_an_epoch_without_a_whole_step_is_refused() -> None:
    with pytest.raises(ValueError, match="dataloader_drop_last leaves none of 7 documents: a step has 8"):
        Evened(range(7), together=1, step=8, drop_last=True)


@pytest.mark.slow
def test_real_processes_read_the_same_in_each_step_wherever_they_go_on(tmp_path: Path) -> None:
    """One process, two and four, with and without workers, each going on with what others began: in each step the same
    documents are read, with the same corruption. Of the seven, the last step of an epoch has three."""
    alone = order_of(tmp_path, 1, workers=0, until=4)
    again: dict[int, list[dict[str, int]]] = {
        4: [{"workers": 0, "until": 3, "resumed": 1}, {"workers": 2, "until": 4}],
        2: [{"workers": 2, "until": 4, "resumed": 3}, {"workers": 0, "until": 4}],
    }
    for world, how in again.items():
        spawned = (world, free_port(), str(tmp_path), how)
        torch.multiprocessing.spawn(order_in_a_process, spawned, nprocs=world)
        found = [json.loads((tmp_path / f"{rank}-of-{world}.json").read_text()) for rank in range(world)]
        for at, each in enumerate(how):
            begin = each.get("resumed", 0)
            for step, expected in enumerate(alone["read"][begin : each["until"]]):
                read = [text for process in found for text in process[at]["read"][step]]
                assert sorted(read) == sorted(expected), (world, each, begin + step)
            for process in found:
                assert process[at]["losses"] == pytest.approx(alone["losses"][: each["until"]], rel=1e-3)
    resumed = order_of(tmp_path, 1, workers=1, until=4, resumed=2)  # of two processes
    assert resumed["read"] == alone["read"][2:]


def test_nothing_is_learned_from_what_is_read_again(tmp_path: Path) -> None:
    given = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    model = tiny_model(gate=0.5, train={"speech": "full"})
    trainer = ZipperTrainer(model, given, DatasetOf(DOCUMENTS))
    documents: Any = trainer.train_dataset
    idle, taken = (trainer.data_collator([documents[n] for n in numbers]) for numbers in ([~1, ~1], [0, ~1]))
    assert IDLE in idle
    assert IDLE not in taken
    assert len(taken["batch"]["speech"]["input_ids"]) == 1
    assert not any(trainer._counts([idle]).targets.values())
    loss = trainer.compute_loss(model, idle, num_items_in_batch=trainer._counts([taken, idle]))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_steps_of_another_size_are_refused(tmp_path: Path) -> None:
    """What had been seen of the epoch was taken for what steps of the new size would have seen."""
    order_of(tmp_path, 1, workers=0, until=1)
    with pytest.raises(ValueError, match=r"a step had 4 documents, now it has 2 \(training.batch_size 2 x .* 1 x 1"):
        order_of(tmp_path, 2, workers=0, until=2, resumed=1)
