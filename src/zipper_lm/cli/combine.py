"""`zipper combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zipper_lm.cli.common import Json, Overwrite, Trust, console, emit, quiet, settings_of


def combine(
    models: Annotated[list[str], typer.Argument(metavar="MODEL MODEL...", help="Folders or Hub ids, two or more.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="For the model with all their towers.")],
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make one model of several whose zips were trained apart over the same frozen tower. Nothing is trained.

    Example: [bold]zipper combine text-speech text-image --output text-speech-image[/bold]
    """
    from zipper_lm.utils.files import check_output

    check_output(output, overwrite)
    if len(models) < 2:
        raise ValueError(f"combine: at least two models are needed, got {models}")
    for source in models:
        _spare(output, source, f"model {source!r}")
    quiet()
    from zipper_lm.models.card import refresh_card
    from zipper_lm.models.combine import combine as run
    from zipper_lm.models.zipper import ZipperModel
    from zipper_lm.utils.files import new_folder, write_json

    combined = run([ZipperModel.from_pretrained(source, trust_remote_code=trust_remote_code) for source in models])
    for name, spec in combined.config.tower_specs.items():
        _spare(output, spec.source, f"tower {name!r}, which is at {spec.source!r}")
    settings = {name: values for source in reversed(models) for name, values in settings_of(source, []).items()}
    with new_folder(output, overwrite) as folder:
        combined.save_pretrained(folder, card=False)
        write_json(folder / "generation.json", settings)
        refresh_card(folder, combined, name=output.name)
    pairs = [f"{reader}<-{source}" for reader, source in combined.layer_pairs]
    console().print(f"{output}: towers {', '.join(combined.names)}; zips {', '.join(pairs)}")
    if json:
        emit({"output": str(output), "towers": combined.names, "zips": pairs})


def _spare(output: Path, source: str, what: str) -> None:
    """Raise `ValueError` if writing `output` would replace a folder that the model needs."""
    here, goal = Path(source).resolve(), output.resolve()
    if source and here.exists() and (goal == here or goal in here.parents):
        raise ValueError(f"--output {str(output)!r} would replace {what}")
