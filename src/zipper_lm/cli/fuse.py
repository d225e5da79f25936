"""`zipper fuse`."""

from __future__ import annotations

import dataclasses

from zipper_lm.cli.common import Changes, Json, Overwrite, Recipe, Resume, console, emit, quiet


def fuse(
    recipe: Recipe, changes: Changes = None, resume: Resume = False, overwrite: Overwrite = False, json: Json = False
) -> None:
    """Fuse towers: train the zips between them on aligned data, and write the model.

    Example: [bold]zipper fuse examples/spoken-digits.yaml data=my/recordings training.steps=2000[/bold]
    """
    from zipper_lm.jobs.recipes.reader import read_recipe
    from zipper_lm.jobs.recipes.schema import FuseRecipe

    read = read_recipe(recipe, changes or [], FuseRecipe)
    if overwrite:
        read = dataclasses.replace(read, overwrite=True)
    from zipper_lm.jobs.fuse import fuse as run

    quiet()
    record = run(read, resume=resume, console=console())
    scores = [entry for entry in record["history"] if "eval_wer" in entry]
    best: dict[str, float] = next((entry for entry in scores if entry["step"] == record["best_step"]), {})
    wer = {k.removeprefix("eval_"): round(v, 2) for k, v in best.items() if k.startswith("eval_wer")}
    told = "".join(f", {k} {v} %" for k, v in wer.items())
    console().print(f"model written to {read.output} after {record['steps']} steps{told} (validation)")
    if json:
        kept = ("steps", "best_step", "seconds", "train_loss", "frozen_unchanged", "signatures", "recipe_hash")
        emit({"output": read.output, **wer, **{k: record[k] for k in kept}})
