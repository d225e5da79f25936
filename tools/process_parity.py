"""Do processes train as one? Runs every way to lay a training out over 2 and 4 processes (gloo, on this CPU), and
compares losses, gradients and weights after 20 steps with those of one. Some batches lack a modality that others have.

    python tools/process_parity.py [--processes 2 4] [--models frozen] [--output docs/runs/processes.json]

The record keeps what was found with other numbers of processes, and of other models. Its last line is how many ways
were equal. Runs that part by rounding alone are compared step by step; how far one process parts from itself is told
beside.
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

from tiny_shards import (  # noqa: E402
    MATRIX,
    MODELS,
    SAMPLE,
    STEPS,
    Way,
    compared,
    limits,
    parted,
    parts_by_rounding,
    spawn,
    train_in_a_process,
)


def measured(world: int, ways: list[Way]) -> list[dict[str, Any]]:
    """The largest differences of so many processes from one, way by way."""
    with TemporaryDirectory() as folder:
        spawn(train_in_a_process, world, folder, ways)
        found = compared(world, Path(folder), ways)
    return [
        {
            "processes": world,
            **asdict(way),
            **_short(apart),
            "same_bits": not any(apart.values()),
            "equal": all(apart[name] <= most for name, most in limits(way, world).items()),
            **({"one_process_from_itself": _short(parted(way, world))} if parts_by_rounding(way, world) else {}),
        }
        for way, apart in found.items()
    ]


def _short(apart: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.1e}") for name, value in apart.items()}


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
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sample", action="store_true", help="a few ways only")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "runs" / "processes.json")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # as each of the processes
    ways: list[dict[str, Any]] = []
    if given.output.is_file():
        again = {(world, model) for world in given.processes for model in given.models}
        kept = json.loads(given.output.read_text())["ways"]
        ways = [way for way in kept if (way["processes"], way["model"]) not in again]
    started = time.time()
    chosen = [way for way in (SAMPLE if given.sample else MATRIX) if way.model in given.models]
    for world in given.processes:
        ways += measured(world, chosen)
    ways.sort(key=lambda way: way["processes"])
    record = {**figure(ways), "seconds": round(time.time() - started), "made_with": made_with(), "ways": ways}
    given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figure(ways)))
    if not all(way["equal"] for way in ways):
        sys.exit(1)


if __name__ == "__main__":
    main()
