"""What an engine gains on many documents, and what guidance costs in it.

python benchmarks/engine.py docs/runs/engine.json [--size small] [--guided-size 135m] [--documents 32]

- `reading`, `speaking`: many documents through one engine with a row for each, and one after the other by
  `model.generate`. Those that are read have between a fifth and all of the size's speech, and get between a quarter and
  all of its text; those that are spoken the other way round. All of it is counted, what is read, too.
- `guided`: a further token of one document in an engine with guidance (two rows), and without (one row).

The record is written anew after every part, and is the last line of the output.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Work:
    """A document, the tower that goes on after it, and how many tokens it gets."""

    document: Document
    writer: str
    tokens: int

    @property
    def settings(self) -> dict[str, Any]:
        """Exactly so many."""
        return {self.writer: exactly(self.tokens)["text"]}


def ragged(size: Size, count: int, writer: str) -> list[Work]:
    """Documents of the other modality than the writer's."""
    draw = random.Random(SEED)
    ids = {"speech": size.speech.ids, "text": size.text.ids}
    least, most = {"speech": size.memory // 5, "text": size.tokens // 4}, {"speech": size.memory, "text": size.tokens}
    (source,) = ids.keys() - {writer}
    found = []
    for _ in range(count):
        read = [draw.randrange(3, ids[source]) for _ in range(draw.randint(least[source], most[source]))]
        found.append(Work(Document([Segment(source, ids=read)]), writer, draw.randint(least[writer], most[writer])))
    return found


def one_after_the_other(model: ZipperModel, works: list[Work]) -> list[list[int]]:
    """By the plain path."""
    return [
        model.generate(work.document, [work.writer], settings=work.settings, decode=False)[-1].ids for work in works
    ]


def together(made: Engine, works: list[Work]) -> list[list[int]]:
    """By an engine."""
    handles = [made.submit(work.document, [work.writer], work.settings) for work in works]
    return [handle.result(decode=False)[-1].ids or [] for handle in handles]


def many(size: Size, count: int, writer: str, compiled: bool, repeats: int) -> dict[str, Any]:
    """All documents, both ways."""
    model, given = fused(size), ragged(size, count, writer)
    with Engine(model, slots=count, compile=compiled) as made:
        same = together(made, given) == one_after_the_other(model, given)
        taken = turns(
            {
                "one after the other": partial(one_after_the_other, model, given),
                "engine": partial(together, made, given),
            },
            repeats,
        )
    tokens = sum(work.tokens for work in given)
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
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    logging.set_verbosity_error()
    record = begun(
        benchmark="engine",
        size=given.size,
        guided_size=given.guided_size,
        compiled=not given.no_compile,
        repeats=given.repeats,
        threads_of_openmp=os.environ.get("OMP_NUM_THREADS"),
    )
    for part, writer in (("reading", "text"), ("speaking", "speech")):
        record[part] = many(SIZES[given.size], given.documents, writer, not given.no_compile, given.repeats)
        keep(record, given.output)
    record["guided"] = guided(SIZES[given.guided_size], not given.no_compile, given.repeats)
    finish(record, given.output)


if __name__ == "__main__":
    main()
