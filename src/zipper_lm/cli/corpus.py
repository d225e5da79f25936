"""`zipper corpus`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from zipper_lm.cli.common import Json, Overwrite, console, emit


def corpus(
    name: Annotated[Literal["digit-images", "sounds", "sentences"], typer.Argument(help="Which one.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="To be made.")],
    source: Annotated[
        Path | None, typer.Option(metavar="DIR", help="sentences: folder of train.txt, validation.txt and test.txt.")
    ] = None,
    train: Annotated[int, typer.Option(help="sentences: most of them for training.", min=1)] = 10_000,
    longest: Annotated[int, typer.Option(help="sentences: most characters of one.", min=1)] = 200,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make an aligned data set for experiments on the spot: handwritten digits, instrument notes, or read sentences.

    Example: [bold]zipper corpus digit-images data/digit-images[/bold]
    """
    if (name == "sentences") != (source is not None):
        raise ValueError(f"--source: needed for sentences, and for nothing else; got {source} for {name}")
    if name == "digit-images":
        from zipper_lm.corpora.digit_images import write_digit_images

        counts = write_digit_images(folder, overwrite=overwrite)
    elif name == "sounds":
        from zipper_lm.corpora.sounds import write_sounds

        counts = write_sounds(folder, overwrite=overwrite)
    else:
        from zipper_lm.corpora.sentences import write_sentences

        assert source is not None
        counts = write_sentences(folder, source, train=train, longest=longest, overwrite=overwrite)
    console().print(f"{folder}: " + ", ".join(f"{split} {count}" for split, count in counts.items()))
    if json:
        emit({"folder": str(folder), "rows": counts})
