"""`zipper verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from zipper_lm.cli.common import Json, Model, Trust, console, emit, load_zipper, quiet

if TYPE_CHECKING:
    from zipper_lm.evaluation.preservation import TowerReport

DIFFERS = 1


def verify(model: Model, trust_remote_code: Trust = False, json: Json = False) -> None:
    """Compare every tower with its source, tensor by tensor; exit code 1 if a frozen one differs.

    Example: [bold]zipper verify outputs/spoken-digits/model[/bold]
    """
    from zipper_lm.evaluation.preservation import changed_sources
    from zipper_lm.evaluation.preservation import verify as run
    from zipper_lm.utils.hub import local_folder

    quiet()
    try:
        loaded = load_zipper(model, trust_remote_code)
    except ValueError:
        changed = changed_sources(model, trust_remote_code=trust_remote_code)
        if not changed:
            raise
        for message in changed.values():
            console().print(f"differs: {message}", style="red")
        if json:
            emit({"identical": False, "changed": changed})
        raise typer.Exit(DIFFERS) from None
    reports = run(loaded, local_folder(model))
    for report in reports:
        console().print(told(report), style=None if report.identical or report.train == "full" else "red")
    identical = all(r.identical for r in reports if r.train != "full")
    if json:
        emit({"identical": identical, "towers": {r.name: _plain(r) for r in reports}})
    if not identical:
        raise typer.Exit(DIFFERS)


def told(report: TowerReport) -> str:
    """One tower in words."""
    source = f"{report.name} ({report.source})"
    if report.train == "full" and not report.source:
        return f"{report.name}: trained; where it came from is not recorded, so there is no source to compare with"
    if report.train == "full":
        return (
            f"{source}: trained; {report.tensors - report.equal} of {report.tensors} tensors differ from the source, "
            f"by at most {report.largest:.3g}"
        )
    kind = "frozen" if report.train == "frozen" else "frozen under LoRA adapters"
    if report.identical:
        return f"{source}: {kind}; all {report.tensors} tensors bit-identical to the source, logits on sample input too"
    if not report.source_as_fused:
        return f"{source}: {kind}, but the source is no longer what the zips were made with"
    return (
        f"{source}: {kind}, but {report.tensors - report.equal} of {report.tensors} tensors differ from the "
        f"source, by at most {report.largest:.3g}; logits on sample input "
        f"{'identical' if report.logits_equal else 'differ'}"
    )


def _plain(report: TowerReport) -> dict[str, Any]:
    return {k: v for k, v in report.summary().items() if k != "name"}
