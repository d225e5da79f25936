"""What the commands share: errors as one line, results as JSON, options that several take."""

from __future__ import annotations

import functools
import io
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from zipper_lm.utils.disk import is_disk_full
from zipper_lm.utils.interruption import signal_of, terminable

if TYPE_CHECKING:
    from rich.console import Console

    from zipper_lm.generation.writer import Writer
    from zipper_lm.models.zipper import ZipperModel

USER_ERROR = 2

debugging: ContextVar[bool] = ContextVar("debugging", default=False)
"""Whether errors are shown with where they came from."""

Json = Annotated[bool, typer.Option("--json", help="End with exactly one line of JSON on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run's newest checkpoint.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a zipped model.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let towers run code that comes with their weights. Read it first.")
]
DType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Of all towers. By default that in which they were saved."),
]
Recipe = Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="What to do.")]
Changes = Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Changes to the recipe.")]


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """A user's error, a full disk, and a device without memory become one line on standard error and exit code 2;
    ``--debug`` shows the traceback. After a signal the exit code is 128 and its number, as shells have it."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        threading.excepthook = _hook
        try:
            with terminable():
                command(*args, **kwargs)
        except Exception as error:
            of_users = isinstance(error, ValueError | OSError | ImportError)  # an extra that is not installed
            if debugging.get() or not (of_users or is_disk_full(error) or _out_of_memory(error)):
                raise
            fail(f"error: {error}", USER_ERROR)
        except KeyboardInterrupt as error:
            fail(f"interrupted: {error}" if str(error) else "interrupted", 128 + signal_of(error))

    return run


def _out_of_memory(error: Exception) -> bool:
    """Whether a device's memory did not suffice. What has not imported torch did not meet it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _hook(told: threading.ExceptHookArgs) -> None:
    """What a thread says of an error that ends it; a full disk is met again by whoever gave it something to write."""
    if debugging.get() or told.exc_value is None or not is_disk_full(told.exc_value):
        threading.__excepthook__(told)


def fail(message: str, code: int) -> None:
    """One line on standard error, then the end."""
    typer.echo(" ".join(message.split()), err=True)
    raise typer.Exit(code)


def replace_unknown_characters() -> None:
    """From now on, standard output and error show ``?`` for a character that their encoding lacks: many a terminal has
    ASCII or Latin-1 only, and a command that is done shall not end in an error for an accent."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def say(text: object) -> None:
    """One result on standard output. Not by `typer.echo`, which writes UTF-8 where the encoding is ASCII."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def console() -> Console:
    """For people, on standard error: standard output is for results."""
    from zipper_lm.utils.progress import plain_console

    return plain_console(stderr=True, quiet=not is_first())


def is_first() -> bool:
    """Whether this is the only process, or the first of those that a launcher started."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def emit(result: Any) -> None:
    """One line of JSON on standard output, from the first process if there are several."""
    if not is_first():
        return
    from zipper_lm.utils.files import as_json

    say(as_json(result))


def quiet() -> None:
    """transformers' own notes and bars off: what matters is said here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_model(source: str, trust_remote_code: bool = False, dtype: str | None = None) -> Writer:
    """A model on the fastest device there is, in a dtype or that in which it was saved.

    Raises:
        ValueError: if it cannot be loaded.
    """
    from zipper_lm.models.load import load

    quiet()
    return load(source, dtype=dtype, trust_remote_code=trust_remote_code)


def tell_slow(model: Writer) -> None:
    """Say, of a command that has ``--dtype``, that this processor is slow at what the model is saved in."""
    from zipper_lm.utils.products import SLOW, slow_matrices
    from zipper_lm.utils.tensors import dtype_name

    for name, decoder in model.backbones().items():
        for dtype in slow_matrices(decoder, decoder.device):
            text = f"{name} is in {dtype_name(dtype)}, {SLOW}: --dtype float32 takes twice the memory and less time"
            console().print(text, style="yellow", highlight=False)


def load_zipper(source: str, trust_remote_code: bool = False, dtype: str | None = None) -> ZipperModel:
    """As `load_model`, for what only towers have.

    Raises:
        ValueError: also if it is a single decoder.
    """
    from zipper_lm.models.zipper import ZipperModel

    model = load_model(source, trust_remote_code, dtype)
    if not isinstance(model, ZipperModel):
        raise ValueError(f"{source} is a single decoder: it has no towers and no zips")
    return model


def settings_of(model: str, changes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Generation settings kept with a model, changed by ``modality.name=value``.

    Raises:
        ValueError: for another form, or a name that is no generation setting.
    """
    from zipper_lm.generation.settings import known_settings
    from zipper_lm.jobs.recipes.yaml_values import parse_value
    from zipper_lm.models.records import generation_settings
    from zipper_lm.utils.hub import local_folder

    settings = {name: dict(values) for name, values in generation_settings(local_folder(model)).items()}
    known = known_settings()
    for change in changes:
        key, found, text = change.partition("=")
        modality, dot, name = key.strip().partition(".")
        if not (found and dot and modality and name):
            raise ValueError(f"--set {change!r}: write modality.name=value, such as speech.temperature=0.7")
        if name not in known:
            raise ValueError(f"--set {change!r}: no generation setting {name!r}; see transformers.GenerationConfig")
        settings.setdefault(modality, {})[name] = parse_value(text, f"--set {change!r}")
    return settings
