"""The tables of docs/cost.md on speed: what was asked of it, what was measured, and a written token beside peers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNS = Path(__file__).parent.parent / "docs" / "runs"
NO_GPU = "not run: needs a GPU"


@dataclass(frozen=True, kw_only=True)
class Aim:
    """One thing that was asked for.

    Args:
        what: in words. command: that measures it. must, aim: at least, or at most where `less` is better.
        record: under docs/runs. figure: from the record. without: what is said where there is none.
    """

    what: str
    command: str
    must: float
    aim: float
    record: str
    figure: Callable[[Any], float | None]
    less: bool = False
    unit: str = "x"
    without: str = "not measured yet"

    def row(self) -> str:
        """What was measured, and whether it is enough."""
        file, measured, verdict = RUNS / self.record, self.without, ""
        if file.exists() and (figure := self.figure(json.loads(file.read_text(encoding="utf-8")))) is not None:
            measured, verdict = f"{figure:.2f}{self.unit}", self._verdict(figure)
        sign = "at most " if self.less else ""
        must, aim = f"{sign}{self.must:g}{self.unit}", f"{sign}{self.aim:g}{self.unit}"
        return f"| {self.what} | {must} | {aim} | {measured} | {verdict} | `{self.command}` |"

    def _verdict(self, figure: float) -> str:
        reached = [figure <= limit if self.less else figure >= limit for limit in (self.must, self.aim)]
        return "**missed**" if not reached[0] else "aim reached" if reached[1] else "must met, aim missed"


def _plain_path(batch: int) -> Callable[[Any], float]:
    def figure(record: Any) -> float:
        (found,) = (r for r in record["rows"] if r["batch"] == batch and not r["feed_forward"])
        return float(found["zipped_to_bare"])

    return figure


def _packed(order: str) -> Callable[[Any], float]:
    return lambda record: float(record["packed_against_padded"][order])


def _training_on_gpu(record: Any) -> float | None:
    """Of the fullest batch: how long Zipper takes, as a multiple of the single decoder of its size."""
    rows = [row for row in record["rows"] if row["batch"] == 16]
    return 1 / rows[0]["ratio_to_zipper"]["single-decoder-as-large"]["training step"] if rows else None


def _written(batch: int, who: str, to: str) -> Callable[[Any], float | None]:
    """How many times as fast one writes as another, from a record of benchmarks/decode.py."""

    def figure(record: Any) -> float | None:
        for part in record["parts"]:
            if part["batch"] == batch and f"time_to_{to}" in (row := part["writers"].get(who, {})):
                return 1 / row[f"time_to_{to}"]
        return None

    return figure


def _milliseconds_on_gpu(record: Any) -> float | None:
    (part,) = (part for part in record["parts"] if part["batch"] == 1)
    row = part["writers"].get("engine", {})
    return 1000 / row["tokens_a_second"] if "tokens_a_second" in row else None


AIMS = (
    Aim(
        what="captured step against the plain path, small towers, batch 1",
        command="benchmarks/decode.py docs/runs/decode-small.json --batch 1 8",
        must=2.5,
        aim=3.5,
        record="decode-small.json",
        figure=_written(1, "engine", "plain"),
    ),
    *(
        Aim(
            what=f"32 ragged documents through the engine against one after the other, {size}, {part}",
            command=f"benchmarks/engine.py docs/runs/{record} {sizes}",
            must=8,
            aim=16,
            record=record,
            figure=lambda record, part=part: record[part]["times_as_fast"],
        )
        for size, sizes, record in (
            ("towers of spoken-digits", "--size digits", "engine-digits.json"),
            ("small towers", "--size small --guided-size digits", "engine-small.json"),
        )
        for part in ("reading", "speaking")
    ),
    *(
        Aim(
            what=f"plain path, a written token against bare eager `generate()`: 135M, batch {batch}",
            command="benchmarks/plain_path.py docs/runs/plain-path.json",
            must=must,
            aim=1.02,
            less=True,
            record="plain-path.json",
            figure=_plain_path(batch),
        )
        for batch, must in ((1, 1.05), (8, 1.05), (32, 1.10))
    ),
    *(
        Aim(
            what=f"engine with {form} weights against bare eager `generate()` in float32: 135M, batch 1",
            command="benchmarks/decode.py docs/runs/decode-135m.json --size 135m",
            must=1.5,
            aim=2.2,
            record="decode-135m.json",
            figure=_written(1, f"engine, {form}", "bare"),
        )
        for form in ("bf16", "int8")
    ),
    Aim(
        what="engine, a guided token against an unguided one: 135M, batch 1",
        command="benchmarks/engine.py docs/runs/engine-digits.json --size digits",
        must=1.15,
        aim=1.05,
        less=True,
        record="engine-digits.json",
        figure=lambda record: record["guided"]["guided_to_unguided"],
    ),
    *(
        Aim(
            what=f"training step, tower 135M frozen with prefix cache against without, {tasks}",
            command="benchmarks/prefix_cache.py docs/runs/prefix-cache.json",
            must=2,
            aim=3,
            record="prefix-cache.json",
            figure=lambda record, row=row: record["rows"][row]["without to kept"]["memory"],
        )
        for row, tasks in enumerate(("speech to text", "both directions"))
    ),
    *(
        Aim(
            what=f"packed against padded rows, useful tokens a second, lengths of spoken digits, batches {drawn}",
            command="benchmarks/packing.py docs/runs/packing-cpu.json",
            must=1.5,
            aim=2,
            record="packing-cpu.json",
            figure=_packed(order),
        )
        for drawn, order in (("of like lengths, as training draws them", "like lengths"), ("at random", "random order"))
    ),
    Aim(
        what="engine on a GPU, 1B in bfloat16, batch 1, a token",
        command="benchmarks/gpu.sh",
        must=4,
        aim=1.2,
        less=True,
        unit=" ms",
        record="gpu/decode-1b.json",
        figure=_milliseconds_on_gpu,
        without=NO_GPU,
    ),
    Aim(
        what="training step on a GPU, 1B + 0.35B (batch 16) against the single decoder of the same size",
        command="benchmarks/gpu.sh",
        must=1.0,
        aim=0.8,
        less=True,
        record="gpu/training-1b.json",
        figure=_training_on_gpu,
        without=NO_GPU,
    ),
)


def aims() -> str:
    """Every aim in a table."""
    lines = ["| what | must | aim | measured | | command |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(aim.row() for aim in AIMS)])


def decoders(name: str) -> str:
    """A written token of everyone, as a multiple of the plain path's, from a record of benchmarks/decode.py."""
    record = json.loads((RUNS / name).read_text(encoding="utf-8"))
    machine = record["made_with"]
    where = machine.get("gpu") or f"{machine['processor']}, threads: {machine['threads']}"
    load = ", ".join(str(part["load"]) for part in record["parts"])
    told = (
        f"{where}; {record['dtype']}, {record['memory']} tokens of memory, {record['tokens']} written in a turn; "
        f"median of {record['repeats']} turns; load of the machine {load} on {machine['cores']} cores."
    )
    lines = [told, "", "| batch | who writes | time, plain path = 1 | time, bare = 1 | tokens a second |"]
    lines.append("|---|---|---|---|---|")
    for part in record["parts"]:
        for who, row in part["writers"].items():
            cells = f"not run: {row['not_run']} | | " if "not_run" in row else _cells(row)
            lines.append(f"| {part['batch']} | {who} | {cells} |")
    return "\n".join(lines)


def _cells(row: Any) -> str:
    return f"{row['time_to_plain']:.2f} | {row['time_to_bare']:.2f} | {row['tokens_a_second']:.1f}"
