"""`zipper experiment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zipper_lm.cli.common import Changes, Json, console, emit, quiet


def experiment(
    plan: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="What to compare.")],
    changes: Changes = None,
    results: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For the records; default results/NAME.jsonl, by the plan's name."),
    ] = None,
    work: Annotated[Path, typer.Option(metavar="DIR", help="For models while they are needed.")] = Path("outputs/work"),
    only: Annotated[
        str, typer.Option(metavar="PATTERN", help="Runs with names like this, such as 'ARM--*' or '*--seed1'.")
    ] = "*",
    json: Json = False,
) -> None:
    """Run an experiment: every arm, point and seed. What has a record is not run again: stop it whenever you like.

    Example: [bold]zipper experiment experiments/main.yaml data=my/recordings[/bold]
    """
    from zipper_lm.experiments.plan import read_experiment
    from zipper_lm.experiments.records import records_file
    from zipper_lm.experiments.run import run_experiment

    read = read_experiment(plan, changes or [])
    quiet()
    file = results or Path("results") / f"{plan.stem}.jsonl"
    records = run_experiment(read, file, work / plan.stem, console(), only)
    file = file.with_name(records_file(file).name)
    console().print(f"{len(records)} runs in {file}; zipper report {file} makes a page of them")
    if json:
        emit({"results": str(file), "runs": dict(_short(records))})


def _short(records: list[dict]) -> list[tuple[str, dict[str, float]]]:
    """Each run's name and its rates."""
    named = []
    for record in records:
        run = record["run"]
        name = f"{run['arm']}--{run['point']}--seed{run['seed']}"
        named.append((name, {task: score["wer"] for task, score in record["scores"].items()}))
    return named
