"""What an engine gains on many documents, and what guidance costs in it.

python benchmarks/engine.py docs/runs/engine.json [--size small] [--guided-size 135m] [--documents 32]

- `ragged`: documents that read between a fifth and all of the memory, and write between a quarter and all of the
  tokens, through one engine with a row for each, and one after the other by `model.generate`. All of it is counted:
  reading, too.
- `guided`: a further token of one document in an engine with guidance (two rows), and without (one row).

The record is written anew after every part, and is the last line of the output.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from common.record import begun, busy, finish, keep
from common.turns import ratio, turns
from decoding.ours import engine, exactly, fused
from decoding.sizes import SIZES, Size
from transformers.utils import logging

from zipper_lm import Document, Engine, Segment, ZipperModel

SEED = 1
SCALE = 1.5  # of guidance


def ragged(size: Size, count: int) -> list[tuple[Document, int]]:
    """Documents, and how many tokens of text each gets."""
    draw = random.Random(SEED)
    found = []
    for document in size.documents(count):
        ids = document[0].ids or []
        length = draw.randint(size.memory // 5, size.memory)
        found.append((Document([Segment("speech", ids=ids[:length])]), draw.randint(size.tokens // 4, size.tokens)))
    return found


def one_after_the_other(model: ZipperModel, given: list[tuple[Document, int]]) -> list[list[int]]:
    """By the plain path."""
    return [
        model.generate(document, ["text"], settings=exactly(tokens), decode=False)[-1].ids for document, tokens in given
    ]


def together(made: Engine, given: list[tuple[Document, int]]) -> list[list[int]]:
    """By an engine."""
    handles = [made.submit(document, ["text"], exactly(tokens)) for document, tokens in given]
    return [handle.result(decode=False)[-1].ids or [] for handle in handles]


def many(size: Size, count: int, compiled: bool, repeats: int) -> dict[str, Any]:
    """All documents, both ways."""
    model, given = fused(size), ragged(size, count)
    with Engine(model, slots=count, tokens=size.tokens + 1, memory=size.memory + 2, compile=compiled) as made:
        same = together(made, given) == one_after_the_other(model, given)
        taken = turns(
            {
                "one after the other": partial(one_after_the_other, model, given),
                "engine": partial(together, made, given),
            },
            repeats,
        )
    tokens = sum(number for _, number in given)
    return {
        "documents": count,
        "tokens": tokens,
        "same_tokens": same,
        "load": busy(),
        "times_as_fast": ratio(taken["one after the other"], taken["engine"]),
        "tokens_a_second": {name: round(tokens / statistics.median(times), 1) for name, times in taken.items()},
    }


def guided(size: Size, compiled: bool, repeats: int) -> dict[str, Any]:
    """A further token with guidance and without."""
    model, given = fused(size), size.documents(1)
    writers = {
        "guided": engine(model, given, compiled=compiled, guidance_scale=SCALE),
        "unguided": engine(model, given, compiled=compiled),
    }
    works = {(name, n): partial(write, n) for name, write in writers.items() for n in (size.tokens, 1)}
    taken = turns(works, repeats)
    further = {
        name: [(long - short) / (size.tokens - 1) for long, short in zip(taken[name, size.tokens], taken[name, 1])]
        for name in writers
    }
    return {"load": busy(), "guided_to_unguided": ratio(further["guided"], further["unguided"])}


def main() -> None:
    """Measure part by part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--guided-size", choices=list(SIZES), default="135m")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    logging.set_verbosity_error()
    record = begun(
        benchmark="engine",
        size=given.size,
        guided_size=given.guided_size,
        compiled=given.compile,
        repeats=given.repeats,
        threads_of_openmp=os.environ.get("OMP_NUM_THREADS"),
    )
    record["ragged"] = many(SIZES[given.size], given.documents, given.compile, given.repeats)
    keep(record, given.output)
    record["guided"] = guided(SIZES[given.guided_size], given.compile, given.repeats)
    finish(record, given.output)


if __name__ == "__main__":
    main()
