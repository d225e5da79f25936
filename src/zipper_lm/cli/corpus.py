"""`zipper corpus`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from zipper_lm.cli.common import Json, Overwrite, console, emit


def corpus(
    name: Annotated[
        Literal["digit-images", "sounds", "genes", "sentences", "prompts", "spoken-digit-images"],
        typer.Argument(help="Which one."),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="To be made.")],
    source: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="sentences: folder of train.txt, validation.txt and test.txt; spoken-digit-images: recordings; "
            "prompts: Asterisk's WAV files.",
        ),
    ] = None,
    train: Annotated[int | None, typer.Option(help="sentences: most for training (10 000).", min=1)] = None,
    shortest: Annotated[int | None, typer.Option(help="sentences: fewest characters of one (1).", min=1)] = None,
    longest: Annotated[
        int | None,
        typer.Option(
            help="sentences, prompts: most characters of one (200); longer sentences are cut, prompts left out.", min=1
        ),
    ] = None,
    flite: Annotated[
        bool, typer.Option("--flite", help="sentences: half of train and test by the voices of the program flite.")
    ] = False,
    voices: Annotated[int | None, typer.Option(help="sentences: of espeak-ng in each split (100).", min=1)] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="sentences: without voices that a public recogniser does not understand.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make an aligned data set for experiments on the spot: handwritten digits, instrument notes, genes, read
    sentences, or the prompts of a telephone exchange.

    Example: [bold]zipper corpus digit-images data/digit-images[/bold]
    """
    if (name in ("sentences", "prompts", "spoken-digit-images")) != (source is not None):
        needs = "sentences, prompts and spoken-digit-images"
        raise ValueError(f"--source: needed for {needs}, and for nothing else; got {source} for {name}")
    if name != "sentences" and (train, shortest, flite, voices, clear) != (None, None, False, None, False):
        raise ValueError(f"--train, --shortest, --flite, --voices and --clear are for sentences only, not for {name}")
    if name not in ("sentences", "prompts") and longest is not None:
        raise ValueError(f"--longest is for sentences and prompts only, not for {name}")
    if name == "digit-images":
        from zipper_lm.experiments.corpora.digit_images import write_digit_images

        counts = write_digit_images(folder, overwrite=overwrite)
    elif name == "sounds":
        from zipper_lm.experiments.corpora.sounds import write_sounds

        counts = write_sounds(folder, overwrite=overwrite)
    elif name == "genes":
        from zipper_lm.experiments.corpora.genes import write_genes

        counts = write_genes(folder, overwrite=overwrite)
    elif name == "spoken-digit-images":
        from zipper_lm.experiments.corpora.spoken_digit_images import write_spoken_digit_images

        assert source is not None
        counts = write_spoken_digit_images(folder, source, overwrite=overwrite)
    elif name == "prompts":
        from zipper_lm.experiments.corpora.prompts import write_prompts

        assert source is not None
        counts = write_prompts(folder, source, longest=longest or 200, overwrite=overwrite)
    else:
        from zipper_lm.experiments.corpora.sentences import VOICES, write_sentences

        assert source is not None
        counts = write_sentences(
            folder,
            source,
            train=train or 10_000,
            shortest=shortest or 1,
            longest=longest or 200,
            flite=flite,
            voices=voices or VOICES,
            clear=clear,
            overwrite=overwrite,
        )
    console().print(f"{folder}: " + ", ".join(f"{split} {count}" for split, count in counts.items()))
    if json:
        emit({"folder": str(folder), "rows": counts})
