"""Documents that share rows beside a row for each, at the lengths of spoken digits: useful tokens a second in training.

python benchmarks/packing.py docs/runs/packing-cpu.json [--repeats 5] [--batch 32]
python benchmarks/packing.py --measure DATA/train     writes the lengths anew

Rows and towers are of the size of `examples/spoken-digits.yaml`, with random ids and weights, both tasks mixed.
Documents are drawn in two orders: like lengths together, as the trainer draws them, and at random. Each order's
documents are made into batches twice, padded and packed; all four take turns, each with its collation, forward and
backward, on one thread. A token is useful if it is no padding. What counts is the ratio of useful tokens a second in
the same turn; more than 1 is for packing. The last line is the record, as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import digits
from common.record import begun, finish
from common.turns import device, ratio, turns

from zipper_lm import ZipperModel
from zipper_lm.data.collation import Batch, collate
from zipper_lm.data.document import Document
from zipper_lm.data.mixture import TaskMixture
from zipper_lm.training.order import grouped
from zipper_lm.utils.files import new_file

BATCHES = 4
LIKE, RANDOM, PADDED, PACKED = "like lengths", "random order", "padded", "packed"


def drawn(batch: int) -> dict[str, list[list[Document]]]:
    """Some batches of documents in each order."""
    mixture = TaskMixture(digits.rows(), digits.TASKS)
    generator = torch.Generator().manual_seed(0)
    orders = {
        LIKE: grouped(mixture.lengths(), batch, generator).tolist(),
        RANDOM: torch.randperm(len(mixture), generator=generator).tolist(),
    }
    found = {}
    for name, order in orders.items():
        whole = [order[start : start + batch] for start in range(0, len(order) - batch + 1, batch)]
        chosen = [whole[k] for k in torch.randperm(len(whole), generator=generator)[:BATCHES].tolist()]
        found[name] = [[mixture[index] for index in numbers] for numbers in chosen]
    return found


def collated(model: ZipperModel, parts: Sequence[Sequence[Document]], packing: bool) -> list[Batch]:
    """A batch of each part's documents."""
    return [collate(documents, model.specials, packing=packing) for documents in parts]


def useful(batches: Sequence[Batch]) -> int:
    """Tokens that are no padding."""
    return sum(int((stream["segments"] >= 0).sum()) for batch in batches for stream in batch.values())


def step(model: ZipperModel, batches: Callable[[], Sequence[Batch]]) -> None:
    """Collation, forward and backward."""
    for batch in batches():
        digits.train(model, batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--measure", type=Path, metavar="SPLIT", help="count the tokens of a split, and keep that")
    given = parser.parse_args()
    if given.measure is not None:
        with new_file(digits.LENGTHS, overwrite=True) as file:
            file.write_text(json.dumps(digits.measured(given.measure), separators=(",", ":")) + "\n", encoding="utf-8")
        return
    torch.set_num_threads(1)
    model = digits.model().to(device()).train()
    model.check_packing()
    record: dict[str, Any] = begun(device=device(), batch=given.batch, repeats=given.repeats)
    made = {
        (order, layout): partial(collated, model, parts, layout == PACKED)
        for order, parts in drawn(given.batch).items()
        for layout in (PADDED, PACKED)
    }
    tokens = {key: useful(batches()) for key, batches in made.items()}
    record["useful_share"] = {
        f"{order}, {layout}": round(tokens[order, layout] / sum(batch.numel() for batch in batches()), 3)
        for (order, layout), batches in made.items()
    }
    taken = turns({key: partial(step, model, batches) for key, batches in made.items()}, given.repeats)
    each = {key: [spent / tokens[key] for spent in seconds] for key, seconds in taken.items()}
    record["packed_against_padded"] = {
        LIKE: ratio(each[LIKE, PADDED], each[LIKE, PACKED]),
        RANDOM: ratio(each[RANDOM, PADDED], each[RANDOM, PACKED]),
        f"packed in {RANDOM}, padded by {LIKE}": ratio(each[LIKE, PADDED], each[RANDOM, PACKED]),
    }
    finish(record, given.output)


if __name__ == "__main__":
    main()
