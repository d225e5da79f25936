"""How long it takes to put an epoch's documents in order: their lengths, as they are drawn, and the order itself.

python benchmarks/epoch_order.py [--rows 1000000]

The rows are prepared ones, in a mapped Arrow file, with 20 tokens of speech and 5 of text on average. For each mixture:
seconds for the lengths of the first epoch (which counts what is stored, and draws), of a later one, and for the order
within it. The last line is the record, as JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from zipper_lm.data.mixture import TaskMixture
from zipper_lm.data.prepared import PreparedRows, row_schema
from zipper_lm.training.order import grouped

MIXTURES: dict[str, tuple[dict[str, float], dict[str, Any]]] = {
    "both ways": ({"speech->text": 1, "text->speech": 1}, {}),
    "and unaligned": ({"speech->text": 1, "text->speech": 1, "->text": 1, "->speech": 1}, {}),
    "1 % interleaved": ({"speech->text": 1, "text->speech": 1}, {"interleave": 0.01}),
}
BATCH = 32


def prepared(file: Path, count: int) -> PreparedRows:
    """Random rows in a file, mapped."""
    draw = np.random.default_rng(0)
    columns: dict[str, Any] = {}
    for name, least, most in (("speech", 5, 36), ("text", 1, 10)):
        lengths = draw.integers(least, most, count, dtype=np.int32)
        ends = np.concatenate([[0], lengths.cumsum(dtype=np.int32)], dtype=np.int32)
        columns[f"{name}_ids"] = pa.ListArray.from_arrays(ends, pa.array(np.full(ends[-1], 5, np.int32)))
        columns[f"{name}_length"] = lengths
    schema = row_schema(["speech", "text"])
    plain = {
        "text": [""] * count,
        "source": [""] * count,
        "labels": pa.array([[]] * count, schema.field("labels").type),
    }
    table = pa.table([{**columns, **plain}[name] for name in schema.names], schema)
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_table(table)
    return PreparedRows(pa.ipc.open_file(pa.memory_map(str(file))).read_all(), ["speech", "text"])


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return round(time.perf_counter() - started, 3), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    count = parser.parse_args().rows
    record: dict[str, Any] = {"rows": count, "batch": BATCH, "seconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        rows = prepared(Path(folder) / "rows.arrow", count)
        for name, (tasks, settings) in MIXTURES.items():
            mixture = TaskMixture(rows, tasks, **settings)
            first, _ = seconds(mixture.lengths)
            mixture.set_epoch(1)
            later, lengths = seconds(mixture.lengths)
            order, _ = seconds(lambda: grouped(lengths, BATCH, torch.Generator().manual_seed(0)))  # noqa: B023
            record["seconds"][name] = {"first epoch": first, "later epoch": later, "order": order}
            print(f"{name}: lengths {first} s, in a later epoch {later} s; order {order} s")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
