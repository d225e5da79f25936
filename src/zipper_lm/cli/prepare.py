"""`zipper prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zipper_lm.cli.common import Changes, Json, Overwrite, Recipe, console, emit, quiet


def prepare(
    recipe: Recipe,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the shards.")],
    changes: Changes = None,
    processes: Annotated[int, typer.Option(metavar="N", help="Processes that encode.")] = 1,
    engine: Annotated[str, typer.Option(metavar="local|ray", help="This machine, or Ray's cluster.")] = "local",
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the whole shards of a run cut off.")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Encode the data of a fuse recipe once, into shards of ids that `zipper fuse RECIPE.yaml data=DIR` trains on.

    Example: [bold]zipper prepare examples/fuse-hub.yaml --output data/prepared --processes 8[/bold]
    """
    from zipper_lm.jobs.recipes.reader import read_recipe
    from zipper_lm.jobs.recipes.schema import FuseRecipe

    read = read_recipe(recipe, changes or [], FuseRecipe)
    from zipper_lm.jobs.prepare import prepare as run

    quiet()
    how: dict[str, Any] = {"processes": processes, "engine": engine, "resume": resume, "overwrite": overwrite}
    told = run(read, output, **how, console=console())
    rows = {name: split["rows"] for name, split in told["splits"].items()}
    counts = ", ".join(f"{count} rows of {name}" for name, count in rows.items())
    left_out = f"; {told['broken']} broken items left out: see {output / 'broken.jsonl'}" if told["broken"] else ""
    console().print(f"prepared data written to {output} after {told['seconds']} s: {counts}{left_out}")
    if json:
        tokens = {name: split["tokens"] for name, split in told["splits"].items()}
        sound = {name: split["seconds"] for name, split in told["splits"].items()}
        kept = {key: told[key] for key in ("broken", "seconds")}
        emit({"output": str(output), "rows": rows, "tokens": tokens, "seconds_of_sound": sound, **kept})
