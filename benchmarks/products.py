"""A training step on the CPU with products by oneDNN where MKL is slow (`training/products.py`), beside one by MKL.

python benchmarks/products.py [docs/runs/products.json] [--sizes digits 135m] [--repeats 7]

Random towers, in float32: both are trained (`digits`), or the text tower is frozen (`135m`). A step is the loss and its
gradients. In turns; what counts is the median of ratios. Where MKL is not slow, `quick` is false and both are the same.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.record import begun, busy, finish, keep
from common.turns import ratio, turns
from decoding.ours import fused
from decoding.sizes import SIZES, Size
from transformers.utils import logging

from zipper_lm import Document, Segment, ZipperModel
from zipper_lm.data.collation import Batch, collate
from zipper_lm.training.products import quick_products, scores_of
from zipper_lm.utils.products import is_quicker

BATCH = 16


def batch_of(size: Size, model: ZipperModel) -> Batch:
    """Speech to text, all of the same lengths."""
    draw = torch.Generator().manual_seed(1)

    def ids(of: int, count: int) -> list[int]:
        return torch.randint(3, of, (count,), generator=draw).tolist()

    documents = [
        Document(
            [
                Segment("speech", ids=ids(size.speech.ids, size.memory)),
                Segment("text", ids=ids(size.text.ids, size.tokens), target=True),
            ]
        )
        for _ in range(BATCH)
    ]
    return collate(documents, model.specials)


def step(model: ZipperModel, batch: Batch, products: AbstractContextManager[None]) -> float:
    """The loss; its gradients are made and forgotten."""
    with products:
        loss = model(batch).loss
        assert loss is not None
        loss.backward()
    model.zero_grad()
    return loss.item()


def once(model: ZipperModel, batch: Batch, products: Callable[[], AbstractContextManager[None]]) -> None:
    """A step of a turn."""
    step(model, batch, products())


def measure(name: str, repeats: int) -> dict[str, Any]:
    """How many times a step by MKL takes one by oneDNN."""
    model = fused(SIZES[name]).train()
    model.tower("speech").requires_grad_(True)
    model.tower("text").requires_grad_(name != "135m")
    batch = batch_of(SIZES[name], model)
    scores = scores_of(model, {tower: side["input_ids"] for tower, side in batch.items()})
    by = {"mkl": nullcontext, "onednn": partial(quick_products, scores)}
    losses = {name: step(model, batch, products()) for name, products in by.items()}
    taken = turns(
        {name: lambda products=products: step(model, batch, products()) for name, products in by.items()}, repeats
    )
    apart = abs(losses["onednn"] - losses["mkl"]) / abs(losses["mkl"])
    return {"load": busy(), "times_as_fast": ratio(taken["mkl"], taken["onednn"]), "losses_apart": f"{apart:.1e}"}


def main() -> None:
    """Measure size by size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--sizes", choices=list(SIZES), nargs="+", default=["digits", "135m"])
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    logging.set_verbosity_error()
    record = begun(
        benchmark="products",
        repeats=given.repeats,
        batch=BATCH,
        quick=is_quicker(),
        threads_of_openmp=os.environ.get("OMP_NUM_THREADS"),
    )
    for name in given.sizes:
        record[name] = measure(name, given.repeats)
        keep(record, given.output)
    finish(record, given.output)


if __name__ == "__main__":
    main()
