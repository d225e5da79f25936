"""`zipper report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zipper_lm.cli.common import Overwrite, console


def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Files of zipper experiment's records.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The page; pictures go beside it.")] = Path("report.md"),
    overwrite: Overwrite = False,
) -> None:
    """Turn the records of experiments into a page of tables and curves.

    Example: [bold]zipper report results/main.jsonl results/data-curve.jsonl --output my/report.md[/bold]
    """
    from zipper_lm.experiments.report import write_report

    write_report(results, output, overwrite=overwrite)
    console().print(f"{output} written")
