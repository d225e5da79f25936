"""`zipper plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from zipper_lm.cli.common import Changes, Json, Recipe, console, emit, quiet, say

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 80

Lengths = Annotated[
    str | None, typer.Option("--lengths", metavar="NAME=TOKENS,...", help="Tokens of a row; else the data is asked.")
]
DeviceName = Annotated[str | None, typer.Option("--device", help="a100, h100, h200, l4, l40s; else this machine.")]
Flops = Annotated[float | None, typer.Option("--flops", help="Operations a second that a step reaches, such as 3e14.")]
Memory = Annotated[float | None, typer.Option("--memory", help="GB of a device.")]
Utilisation = Annotated[float | None, typer.Option("--utilisation", help="Share of a device's peak, such as 0.4.")]
Processes = Annotated[
    str | None, typer.Option("--processes", metavar="N,...", help="Project to so many devices, such as 8,64,512.")
]
Interconnect = Annotated[float | None, typer.Option("--interconnect", help="GB/s that each process has to the others.")]


def plan(
    recipe: Recipe,
    changes: Changes = None,
    lengths: Lengths = None,
    device: DeviceName = None,
    flops: Flops = None,
    memory: Memory = None,
    utilisation: Utilisation = None,
    processes: Processes = None,
    interconnect: Interconnect = None,
    json: Json = False,
) -> None:
    """Say what a fusion takes before anything is loaded or trained: parameters, memory, operations, time, what fits.

    Example: [bold]zipper plan examples/spoken-digits.yaml --lengths text=16,speech=80 --device h100[/bold]
    """
    from zipper_lm.jobs.recipes.reader import read_recipe
    from zipper_lm.jobs.recipes.schema import FuseRecipe

    read = read_recipe(recipe, changes or [], FuseRecipe)
    given = {name: _whole("--lengths", n) for name, n in _pairs(lengths)}
    numbers = [_whole("--processes", n) for n in processes.split(",")] if processes else []
    if interconnect is not None and not interconnect > 0:
        raise ValueError(f"plan: --interconnect={interconnect}: must be above 0")
    from zipper_lm.jobs.cost.devices import find_device
    from zipper_lm.jobs.cost.plan import plan as run

    quiet()

    def find(dtypes: tuple[str, ...] = ("float32",)) -> Any:
        return find_device(device, flops=flops, memory=memory, utilisation=utilisation, dtypes=dtypes)

    if device is not None or flops is not None:
        find()  # what is wrong with it is said before the long work
    told = run(read, find, lengths=given, processes=numbers, interconnect=interconnect)
    if json:
        emit(told)
        return
    for line in text_of(told):
        say(line)
    console().print("What is counted, and what is assumed: docs/planning.md", style="dim")


def _pairs(text: str | None) -> list[tuple[str, str]]:
    pairs = [part.partition("=") for part in text.split(",")] if text else []
    for name, equals, _ in pairs:
        if not (name.strip() and equals):
            raise ValueError(f"plan: --lengths={text!r}: write NAME=TOKENS,..., such as text=40,speech=250")
    return [(name.strip(), number) for name, _, number in pairs]


def _whole(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"plan: {option}: {text!r} is no whole number") from error


def text_of(told: dict[str, Any]) -> list[str]:
    """A plan as lines of at most 80 characters."""
    from rich.console import Console

    out = Console(width=WIDTH, emoji=False, highlight=False, markup=False, color_system=None)
    with out.capture() as capture:
        for part in (_parameters(told), _memory(told), _ways(told), _processes(told)):
            if part is not None:
                out.print(part)
        out.print(_rest(told), soft_wrap=False)
    return [line.rstrip() for line in capture.get().splitlines()]


def _table(*headings: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", overflow="fold")
    return table


def _parameters(told: dict[str, Any]) -> Table:
    table = _table("parameters", "frozen", "trained")
    parts = told["parameters"]
    for name, of in parts.items():
        table.add_row(name, f"{of['frozen']:,}", f"{of['trained']:,}")
    table.add_row("all", *(f"{sum(of[kind] for of in parts.values()):,}" for kind in ("frozen", "trained")))
    return table


def _memory(told: dict[str, Any]) -> Table:
    table = _table("memory", "weights", "gradients", "optimizer", "activations", "all")
    kinds = ("weights", "gradients", "optimizer", "activations", "total")
    table.add_row("a step", *(amount(told["memory"][kind]) for kind in kinds))
    return table


def _ways(told: dict[str, Any]) -> Table:
    table = _table("what fits", "memory", "largest batch", "step")
    table.add_row("as the recipe says", *_fits(told["memory"], told["time"]["step"]))
    for row in told["ways"]:
        if "error" in row:
            table.add_row(f"{row['way']}: {row['error']}", "-", "-", "-")
            continue
        kept = f", {amount(row['kept'])} of the host's" if row.get("kept") else ""
        table.add_row(
            row["way"].replace("training.", "").replace("arguments.", "") + kept,
            *_fits(row["memory"], row["step_seconds"]),
        )
    return table


def _fits(memory: dict[str, Any], seconds: float) -> list[str]:
    return [
        amount(memory["total"]) + ("" if memory["fits"] else " too much"),
        str(memory["largest_batch"]),
        duration(seconds),
    ]


def _processes(told: dict[str, Any]) -> Table | None:
    if not told.get("processes"):
        return None
    table = _table("processes", "memory", "sent", "step", "busy", "documents/s", "run")
    for row in told["processes"]:
        table.add_row(
            f"{row['processes']} {row['kind']}",
            amount(row["memory"]) + ("" if row["fits"] else " too much"),
            amount(row["sent"]),
            duration(row["step_seconds"][1]),
            f"{100 * row['efficiency']:.0f} %",
            f"{row['documents_per_second']:,.0f}",
            duration(3600 * row["hours"]),
        )
    return table


def _rest(told: dict[str, Any]) -> str:
    batch, device, flops, time = (told[part] for part in ("batch", "device", "flops", "time"))
    lengths = ", ".join(f"{name} {tokens:.0f}" for name, tokens in batch["lengths"].items())
    times = f" x {batch['accumulated']}" if batch["accumulated"] > 1 else ""
    reached = ", ".join(
        f"{dtype} {count(n)}FLOP/s" for dtype, n in device["flops"].items() if dtype in flops["by_dtype"]
    )
    written = ", ".join(f"{name} {count(n)}FLOP" for name, n in flops["token"].items())
    lines = [
        f"batch: {batch['documents']}{times} documents ({lengths} tokens), {batch['tokens']:.0f} tokens with padding",
        f"a step: {count(flops['step'])}FLOP; a token that is written: {written}",
        f"device: {device['name']}, {amount(device['memory'])}, {reached}",
        f"  ({device['origin']}; {100 * device['utilisation']:.0f} % of it reached: assumed)",
        f"a step takes {duration(time['step'])}, {time['steps']} steps {duration(time['run'])}, scoring not counted",
    ]
    return "\n".join(lines)


def amount(size: float) -> str:
    """Bytes, for people."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def count(number: float) -> str:
    """A large number, with the letter that stands before a unit."""
    for unit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return f"{number:.3g} "


def duration(seconds: float) -> str:
    """Seconds, for people."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{1e3 * seconds:.3g} ms"
