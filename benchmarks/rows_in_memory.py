"""How much memory it takes to prepare many rows, and to read them in training.

python benchmarks/rows_in_memory.py docs/runs/rows-in-memory.json [--rows 10000 100000]

Each number of rows has a process of its own, in which nothing but this happens: a JSONL file of sentences and sequences
of letters is prepared as by `zipper prepare` (one process, shards of 1000 rows), and an epoch of what was prepared is
read as training does: the order by lengths, documents, noise, batches of 32. Measured is the most memory that no file
stands behind (RssAnon of Linux, looked at every 10 ms), beyond what it was before. What a row adds is the difference
between the largest and the smallest number of rows. The last line is the record, as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common.record import begun, finish

BATCH = 32
SEED = 0
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "zero")


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def watched(told: Callable[[int], None]) -> Iterator[None]:
    """Tell the most bytes that were added meanwhile."""
    before, most, done = anonymous(), [0], threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], anonymous() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        told(max(most[0], anonymous() - before))


def write(folder: Path, count: int) -> Path:
    """A line of three words and 40 letters for each row."""
    draw = np.random.default_rng(SEED)
    file = folder / f"{count}.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            text = " ".join(WORDS[n] for n in draw.integers(len(WORDS), size=3))
            letters = "".join("ACGT"[n] for n in draw.integers(4, size=40))
            stream.write(json.dumps({"text": text, "gene": letters, "speaker": f"s{number % 100}"}) + "\n")
    return file


def recipe(folder: Path, source: Path) -> Any:
    """Of two towers that are nothing but their codecs."""
    from zipper_lm.codecs.sequence import SequenceCodec, SequenceCodecConfig
    from zipper_lm.codecs.text import TextCodec
    from zipper_lm.jobs.recipes.reader import build
    from zipper_lm.jobs.recipes.schema import FuseRecipe

    codecs = {
        "text": TextCodec.train(list(WORDS), vocab_size=64),
        "gene": SequenceCodec(SequenceCodecConfig(alphabet=tuple("ACGT"))),
    }
    for name, codec in codecs.items():
        if not (folder / name).is_dir():
            codec.save_pretrained(folder / name)
    towers = {name: {"source": str(folder / name)} for name in codecs}
    data = {"source": str(source), "validation": None}
    fields = {"towers": towers, "data": data, "tasks": {"gene->text": 1, "text->gene": 1}, "output": str(folder / "m")}
    return build(FuseRecipe, fields)


def read(folder: Path) -> int:
    """An epoch of what was prepared, as training reads it; returns the documents."""
    from zipper_lm.data.collation import Specials, collate
    from zipper_lm.data.mixture import TaskMixture
    from zipper_lm.data.prepared import TRAIN, open_prepared
    from zipper_lm.training.corruption import CorruptedDocuments
    from zipper_lm.training.order import Evened, LikeLengths

    rows = open_prepared(folder).rows(TRAIN)
    mixture = TaskMixture(rows, {"gene->text": 1, "text->gene": 1})
    specials = {"text": Specials(0, 1, 2), "gene": Specials(0, 1, 2)}
    how: dict[str, Any] = {"corrupt": 0.1, "history_dropout": 0.3, "sizes": {"text": 60, "gene": 4}, "seed": SEED}
    documents = CorruptedDocuments(mixture, specials, **how)
    batch, seen = [], 0
    for number in Evened(LikeLengths(documents, BATCH, SEED), together=1, step=BATCH):
        batch.append(documents[number])
        if len(batch) == BATCH:
            collate(batch, specials)
            batch.clear()
        seen += 1
    return seen


def one(folder: Path, count: int) -> dict[str, Any]:
    """What one number of rows takes, in this process."""
    from rich.console import Console

    from zipper_lm.jobs.prepare import prepare

    quiet = Console(quiet=True)
    warm = write(folder, 100)  # what is loaded once is none of the rows'
    prepare(recipe(folder, warm), folder / "warm", console=quiet)
    read(folder / "warm")
    file, found = write(folder, count), dict[str, Any](rows=count, file_bytes=0)
    found["file_bytes"] = file.stat().st_size
    start = time.perf_counter()
    with watched(lambda most: found.update(prepare_bytes=most)):
        prepare(recipe(folder, file), folder / "ids", console=quiet)
    found["prepare_seconds"] = round(time.perf_counter() - start, 1)
    start = time.perf_counter()
    with watched(lambda most: found.update(read_bytes=most)):
        assert read(folder / "ids") == count
    return found | {"read_seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(one(Path(folder), given.one)))
        return
    record: dict[str, Any] = begun(seed=SEED, batch=BATCH, of=[])
    for count in sorted(given.rows):
        ran = subprocess.run([sys.executable, __file__, "--one", str(count)], stdout=subprocess.PIPE, check=True)
        record["of"].append(json.loads(ran.stdout.splitlines()[-1]))
    least, most = record["of"][0], record["of"][-1]
    added = max(1, most["rows"] - least["rows"])
    record["bytes_a_row"] = {
        what: round((most[f"{what}_bytes"] - least[f"{what}_bytes"]) / added, 1) for what in ("prepare", "read")
    }
    finish(record, given.output)


if __name__ == "__main__":
    main()
