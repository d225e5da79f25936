"""`zipper serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zipper_lm.cli.common import DType, Trust, console, load_zipper, quiet, tell_slow

if TYPE_CHECKING:
    from zipper_lm.generation.engine.engine import Engine

DEMO = Path("zipper-demo") / "model"


def serve(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Folder or Hub id of a zipped model.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Serve what `zipper demo` made here.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is any that is free.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="ZIPPER_API_KEY", help="Key that clients must have. Others may see arguments.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File whose first line is that key.")] = None,
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Let anybody in who reaches an address beyond this machine.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="What clients call the model. By default its folder's name.")] = None,
    language: Annotated[str | None, typer.Option(help="The model's language, such as en; others are refused.")] = None,
    turns: Annotated[int, typer.Option(min=0, help="Earlier turns that a spoken answer reads.")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="Documents that are written side by side.")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="Documents that wait or are written at once.")] = 128,
    compile_: Annotated[bool, typer.Option("--compile", help="Compile each tower's step; takes a minute.")] = False,
    dtype: DType = None,
    trust_remote_code: Trust = False,
) -> None:
    """Serve a model: a page to talk to it, and OpenAI's routes for sound, text and chat, for many clients.

    Example: [bold]zipper serve outputs/spoken-digits/model[/bold]
    """
    try:
        from zipper_lm.serve.lifecycle import is_local, listen
        from zipper_lm.serve.lifecycle import serve as run
        from zipper_lm.serve.limits import Limits
        from zipper_lm.serve.service import Service
    except ModuleNotFoundError as error:
        raise ImportError(f"zipper serve needs {error.name}: pip install 'zipper-lm[serve]'") from error
    source = _source(model, demo)
    key = _key(api_key, api_key_file)
    local = is_local(host)
    if not local and key is None and not without_key:
        raise ValueError(f"--host {host}: others can reach it, so --api-key-file is needed (or --without-key)")
    quiet()
    limits = Limits(documents=queue)
    service = Service(
        name or _name(source), key=key, limits=limits, host=host, local=local, language=language, turns=turns
    )
    try:
        listening = listen(host, port)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (")[0]
        raise ValueError(f"--host {host} --port {port}: {why} (port 0 is any that is free)") from error
    at = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"

    def load() -> Engine:
        from zipper_lm.generation.engine.engine import Engine

        loaded = load_zipper(source, trust_remote_code, dtype)
        tell_slow(loaded)
        return Engine(loaded.eval(), slots=slots, compile=compile_, limit=queue)

    console().print(f"loading {source}; {at} answers 503 until it is there")
    run(
        load,
        service,
        listening,
        ready=lambda: console().print(f"serving {service.name} at {at} (there is a page to talk to it)"),
    )


def _source(model: str | None, demo: bool) -> str:
    if demo == (model is not None):
        raise ValueError("name a MODEL, or --demo")
    if model is not None:
        if not Path(model).exists() and model.count("/") != 1:
            raise ValueError(f"{model}: no such folder, and no Hub id")
        return model
    if not DEMO.is_dir():
        raise ValueError(f"--demo: there is no {DEMO} here; `zipper demo` (in a clone: make demo) makes it in minutes")
    return str(DEMO)


def _key(key: str | None, file: Path | None) -> str | None:
    if file is not None:
        key = (file.read_text(encoding="utf-8").splitlines() or [""])[0].strip()
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("--api-key must be printable ASCII without spaces, and not empty")
    return key


def _name(source: str) -> str:
    """A folder's name, or that of the one around it where it is called ``model``; a Hub id is one."""
    path = Path(source)
    if not path.exists():
        return source
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name
