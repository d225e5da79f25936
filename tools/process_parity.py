"""Do processes train as one? Runs every way to lay a training out over 2 and 4 processes (gloo, on this CPU), and
compares losses, gradients and weights after 20 steps with those of one. Some batches lack a modality that others have.

    python tools/process_parity.py [--processes 2 4] [--output docs/runs/processes.json]

The record keeps what was found with other numbers of processes. Its last line is how many ways were equal.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from zipper_lm.utils.machine import made_with

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tiny_shards import MATRIX, SAMPLE, STEPS, compared, limits, spawn, train_in_a_process  # noqa: E402


def measured(world: int, sample: bool) -> list[dict[str, Any]]:
    """The largest differences of so many processes from one, way by way."""
    ways = SAMPLE if sample else MATRIX
    with TemporaryDirectory() as folder:
        spawn(train_in_a_process, world, folder, ways)
        found = compared(world, Path(folder), ways)
    return [
        {
            "processes": world,
            **asdict(way),
            **{name: float(f"{value:.1e}") for name, value in apart.items()},
            "same_bits": not any(apart.values()),
            "equal": all(apart[name] <= most for name, most in limits(way, world).items()),
        }
        for way, apart in found.items()
    ]


def figure(ways: list[dict[str, Any]]) -> dict[str, Any]:
    """What the record comes to: how many configurations x processes were compared with one process, and were equal."""
    return {
        "steps": STEPS,
        "processes": sorted({way["processes"] for way in ways}),
        "compared": len(ways),
        "equal": sum(way["equal"] for way in ways),
        "same bits": sum(way["same_bits"] for way in ways),
    }


def main() -> None:
    """Compare, write the record, and end with its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sample", action="store_true", help="a few ways only")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "runs" / "processes.json")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # as each of the processes
    ways: list[dict[str, Any]] = []
    if given.output.is_file():
        ways = [way for way in json.loads(given.output.read_text())["ways"] if way["processes"] not in given.processes]
    started = time.time()
    for world in given.processes:
        ways += measured(world, given.sample)
    record = {**figure(ways), "seconds": round(time.time() - started), "made_with": made_with(), "ways": ways}
    given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figure(ways)))
    if not all(way["equal"] for way in ways):
        sys.exit(1)


if __name__ == "__main__":
    main()
