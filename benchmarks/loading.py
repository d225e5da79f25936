"""How long it takes to load a batch of 32 documents, and whether a training step waits for it.

python benchmarks/loading.py docs/runs/loading-cpu.json [--repeats 20]

Rows are as long as those of `examples/spoken-digits.yaml`, and eight times as long, with its tasks and history dropout.
First, a batch is made of documents by lists of Python numbers, as it once was, and by arrays; the two take turns, and
the ratio is what counts. Then, for how long a training step of that recipe's size (forward and backward, on one thread)
waits for loading (rows to documents, noise, batch), in this process and by a worker beside it. The last line is the
record, as JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import digits
from common.record import begun, finish
from common.turns import device, ratio, seconds, turns
from torch.utils.data import DataLoader

from zipper_lm import ZipperModel
from zipper_lm.data.collation import ABSENT, IGNORED, Batch, Specials, collate, tokens_of
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.mixture import TaskMixture
from zipper_lm.training.corruption import CorruptedDocuments
from zipper_lm.training.trainer import DocumentCollator

BATCH = 32
TIMES = {"spoken digits": 1, "eight times as long": 8}
STEPS = 8


def by_lists(documents: Sequence[Document], specials: Mapping[str, Specials]) -> dict[str, dict[str, torch.Tensor]]:
    """A batch from lists, without who speaks next: less than `collate` does."""
    made = {}
    for name, special in specials.items():
        rows: list[dict[str, list[int]]] = []
        for document in documents:
            row: dict[str, list[int]] = {key: [] for key in ("input_ids", "segments", "positions", "labels")}
            for number, segment in enumerate(document):
                if segment.modality == name:
                    ids = tokens_of(segment, special)
                    row["input_ids"] += ids
                    row["segments"] += [number] * len(ids)
                    row["positions"] += range(len(ids))
                    expected = ids[1:] if segment.labels is None else [*segment.labels, special.eos]
                    row["labels"] += [IGNORED, *expected] if segment.target else [IGNORED] * len(ids)
            row["attention_mask"] = [1] * len(row["input_ids"])
            rows.append(row)
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": special.pad, "segments": ABSENT, "positions": 0, "labels": IGNORED, "attention_mask": 0}
        made[name] = {
            key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])
            for key, value in fill.items()
        }
    return made


def _listed(segment: Segment) -> Segment:
    """The segment with its ids and labels as lists."""
    labels = None if segment.labels is None else list(segment.labels)
    return Segment(segment.modality, ids=list(segment.ids or []), labels=labels, target=segment.target)


def check_alike(lists: Mapping[str, Mapping[str, torch.Tensor]], arrays: Batch) -> None:
    """Both ways give the same, or their times cannot be compared."""
    for name, stream in lists.items():
        assert all(torch.equal(made, arrays[name][key]) for key, made in stream.items()), name


def data(model: ZipperModel, times: int) -> CorruptedDocuments:
    """Documents as the trainer has them."""
    mixture = TaskMixture(digits.rows(times), digits.TASKS)
    sizes = model.trained_vocabularies()
    return CorruptedDocuments(mixture, model.specials, corrupt=0.0, history_dropout=0.3, sizes=sizes, seed=0)


def batches(
    found: CorruptedDocuments, specials: Mapping[str, Specials], workers: int, count: int
) -> Iterator[dict[str, Batch]]:
    """So many batches, as Trainer's loader gives them."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[: count * BATCH].tolist()
    collator = DocumentCollator(dict(specials))
    return iter(DataLoader(found, BATCH, sampler=order, num_workers=workers, collate_fn=collator))


def waited(model: ZipperModel, found: CorruptedDocuments, workers: int) -> dict[str, float]:
    """Median milliseconds that a step takes, and that it waited for its batch; the first, when workers start, is left
    out."""
    waits, steps = [], []
    loader = batches(found, model.specials, workers, STEPS + 1)
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        batch = next(loader)["batch"]
        waits.append(time.perf_counter() - start)
        steps.append(seconds(partial(digits.train, model, batch)))
    return {"step": milliseconds(steps[1:]), "waited": milliseconds(waits[1:])}


def loaded(model: ZipperModel, found: CorruptedDocuments) -> Batch:
    """One batch, loaded in this process."""
    return next(batches(found, model.specials, 0, 1))["batch"]


def milliseconds(taken: Sequence[float]) -> float:
    return round(1000 * statistics.median(taken), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = digits.model().to(device()).train()
    record: dict[str, Any] = begun(device=device(), documents=BATCH, repeats=given.repeats, rows={})
    for name, times in TIMES.items():
        found = data(model, times)
        documents = [found[index] for index in range(BATCH)]
        listed = [Document(map(_listed, document)) for document in documents]
        check_alike(by_lists(listed, model.specials), collate(documents, model.specials))
        taken = turns(
            {
                "lists": partial(by_lists, listed, model.specials),
                "arrays": partial(collate, documents, model.specials),
                "loading": partial(loaded, model, found),
            },
            given.repeats,
        )
        record["rows"][name] = {
            "batch_by_lists_against_arrays": ratio(taken["lists"], taken["arrays"]),
            "loading_ms": milliseconds(taken["loading"]),
            "by_workers": {str(workers): waited(model, found, workers) for workers in (0, 1)},
        }
    finish(record, given.output)


if __name__ == "__main__":
    main()
