"""The `zipper` command: one table, one small file per command.

Nothing here imports torch; each command does when it runs, so that ``--help`` is there at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from zipper_lm import __version__
from zipper_lm.cli.combine import combine
from zipper_lm.cli.common import debugging, guarded, replace_unknown_characters, say
from zipper_lm.cli.corpus import corpus
from zipper_lm.cli.demo import demo
from zipper_lm.cli.evaluate import evaluate
from zipper_lm.cli.experiment import experiment
from zipper_lm.cli.export import export
from zipper_lm.cli.fuse import fuse
from zipper_lm.cli.generate import InOrder, generate
from zipper_lm.cli.inspect import inspect
from zipper_lm.cli.plan import plan
from zipper_lm.cli.prepare import prepare
from zipper_lm.cli.pretrain import pretrain
from zipper_lm.cli.push import push
from zipper_lm.cli.report import report
from zipper_lm.cli.serve import serve
from zipper_lm.cli.verify import verify


class _Commands(TyperGroup):
    """``--debug`` counts wherever it stands, and a terminal gets no character that it has not."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        replace_unknown_characters()
        return super().main(*args, **kwargs)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        debug = [a for a in args if a == "--debug"][:1]
        return super().parse_args(ctx, debug + [a for a in args if a != "--debug"])


app = typer.Typer(
    name="zipper",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(guarded(demo))
app.command()(guarded(pretrain))
app.command()(guarded(prepare))
app.command()(guarded(plan))
app.command()(guarded(fuse))
app.command(cls=InOrder)(guarded(generate))
app.command()(guarded(serve))
app.command()(guarded(evaluate))
app.command()(guarded(verify))
app.command()(guarded(inspect))
app.command()(guarded(combine))
app.command()(guarded(export))
app.command()(guarded(push))
app.command()(guarded(corpus))
app.command()(guarded(experiment))
app.command()(guarded(report))


def _tell_version(wanted: bool) -> None:
    if wanted:
        say(f"zipper {__version__}")
        raise typer.Exit


@app.callback()
def zipper(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="ZIPPER_DEBUG", help="Show where an error came from.")
    ] = False,
) -> None:
    """Fuse pre-trained decoder language models into one multimodal model."""
    debugging.set(debug)
