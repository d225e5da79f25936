"""What `zipper prepare` wrote: its manifest is changed, and all rows are read."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from fuzz.target import Target
from fuzz.targets.folders import changes, link, replace
from tiny_recipes import tiny_recipe

from zipper_lm.data.prepared import open_prepared
from zipper_lm.jobs.prepare import prepare
from zipper_lm.jobs.recipes.reader import to_mapping

WORDS = ("train", "validation", "clips", "text", "speech", "../secret.txt", "train/00000.arrow", "segments", "sha256")


def make() -> Target:
    """Of the tiny recipe's data."""
    return Target(name="prepared", run=run, share=25, inputs=changes(saved(), ["prepared.json"], WORDS))


def run(data: bytes, folder: Path) -> None:
    """Opened, and all that training asks of it."""
    link(saved(), folder)
    replace(folder, data)
    read_all(folder)


def read_all(folder: Path) -> None:
    """Every row, its counts and its labels."""
    found = open_prepared(folder)
    found.check_modalities(["text", "speech"])
    found.check_codecs({})
    for split in ("train", "validation"):
        rows = found.rows(split)
        rows.counts()
        rows.without({"speaker": ["odd"]})
        for number in range(min(len(rows), 50)):
            rows[number]


@functools.cache
def saved() -> Path:
    """Prepared data."""
    folder = Path(tempfile.mkdtemp(prefix="zipper-fuzz-prepared-")) / "data"
    prepare(tiny_recipe(folder), folder, shard_rows=5)
    return folder


@functools.cache
def recipe() -> object:
    """That it was made of."""
    return to_mapping(tiny_recipe(saved()))
