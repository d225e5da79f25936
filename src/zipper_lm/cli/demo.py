"""`zipper demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zipper_lm.cli.common import Json, Overwrite, console, emit, quiet


def demo(
    output: Annotated[Path, typer.Option(help="Folder for report.html and results.json.")] = Path("zipper-demo"),
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Make the shipped towers, codec and judge anew first.")
    ] = False,
    llm: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="An instruct LLM (folder or Hub id) hears and answers, frozen."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the fusion; sentences, voices and shipped parts stay.")] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Fuse a small text tower and a small speech tower on synthetic voices, in minutes, and show what came of it.

    With --llm a real LLM is asked something aloud, and its own answer is spoken, in about twenty minutes.

    Example: [bold]zipper demo --output zipper-demo[/bold]
    """
    from zipper_lm.utils.files import check_output

    check_output(output, overwrite)
    quiet()
    if llm is not None:
        from zipper_lm.demo.llm import LlmSizes, demo_llm

        if from_scratch:
            raise ValueError("--from-scratch has no effect with --llm, which takes the shipped speech parts")
        answered = demo_llm(llm, output, overwrite=overwrite, console=console(), sizes=LlmSizes(seed=seed))
        if json:
            emit(answered)
        return
    from zipper_lm.demo.run import demo as run
    from zipper_lm.demo.sizes import DemoSizes

    sizes = DemoSizes(fusion_seed=seed)
    results = run(output, from_scratch=from_scratch, overwrite=overwrite, console=console(), sizes=sizes)
    if json:
        emit(results)
