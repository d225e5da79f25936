"""`zipper export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zipper_lm.cli.common import Json, Model, Overwrite, Trust, console, emit, load_model


def export(
    model: Model,
    output: Annotated[Path, typer.Option(metavar="DIR", help="For the checkpoint and the tower's codec.")],
    tower: Annotated[str | None, typer.Option(metavar="NAME", help="Which; a single decoder has but one.")] = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Write one tower as a plain Hugging Face checkpoint, with adapters merged and without zips.

    Example: [bold]zipper export outputs/spoken-digits/model --tower speech --output speech-tower[/bold]
    """
    from zipper_lm.models.export import export_tower
    from zipper_lm.utils.files import check_apart, check_output

    check_apart(output, {f"model {model!r}": model})
    check_output(output, overwrite)
    loaded = load_model(model, trust_remote_code)
    names = list(loaded.backbones())
    if tower is None and len(names) > 1:
        raise ValueError(f"--tower NAME is needed: this model has {names}")
    name = names[0] if tower is None else tower
    export_tower(loaded, name, output, overwrite=overwrite)
    architecture = loaded.config.tower_specs[name].architecture
    console().print(f"{output}: tower {name}, a {architecture}", highlight=False)
    if json:
        emit({"output": str(output), "tower": name, "architecture": architecture})
