"""`zipper pretrain`."""

from __future__ import annotations

from zipper_lm.cli.common import Changes, Json, Overwrite, Recipe, Resume, console, emit, quiet


def pretrain(
    recipe: Recipe, changes: Changes = None, resume: Resume = False, overwrite: Overwrite = False, json: Json = False
) -> None:
    """Make a small tower from scratch, with its codec, from unaligned data.

    Example: [bold]zipper pretrain examples/pretrain-text.yaml data=my/texts output=towers/text[/bold]
    """
    from zipper_lm.jobs.recipes.reader import read_recipe
    from zipper_lm.jobs.recipes.schema import PretrainRecipe

    read = read_recipe(recipe, changes or [], PretrainRecipe)
    from zipper_lm.jobs.pretrain import pretrain as run

    quiet()
    metrics = run(read, overwrite=overwrite, resume=resume, console=console())
    shown = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in metrics.items())
    console().print(f"tower and codec written to {read.output}{': ' if shown else ''}{shown}")
    if json:
        emit({"output": read.output, **metrics})
