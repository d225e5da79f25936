"""`zipper push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zipper_lm.cli.common import Json, Model, Trust, console, emit, load_model

if TYPE_CHECKING:
    from zipper_lm.generation.writer import Writer


def push(
    model: Model,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="On the Hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it is not there.")] = None,
    bundle_towers: Annotated[
        bool, typer.Option("--bundle-towers", help="Also upload frozen towers that have a Hub id; mind their licences.")
    ] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Upload a model with its card to the Hugging Face Hub. It is loaded and checked first.

    Example: [bold]zipper push outputs/spoken-digits/model OWNER/spoken-digits --private[/bold]
    """
    from zipper_lm.models.sharing import check_target, staged, upload
    from zipper_lm.utils.hub import local_folder

    if "/" not in repository:
        raise ValueError(f"OWNER/NAME: {repository!r} has no owner")
    check_target(repository)
    loaded = load_model(model, trust_remote_code)  # a model that cannot be loaded is not to be shared
    with staged(loaded, repository, kept=local_folder(model), bundle_towers=bundle_towers) as folder:
        sizes = {f.relative_to(folder).as_posix(): f.stat().st_size for f in folder.rglob("*") if f.is_file()}
        towers = where_towers_are(loaded, folder)
        for file, size in sorted(sizes.items()):
            console().print(f"{size:>15,}  {file}", highlight=False)
        for name, where in towers.items():
            console().print(f"tower {name}: {where}", highlight=False)
        commit = upload(folder, repository, private=private or None, revision=revision, create_pr=create_pr)
    console().print(f"uploaded: {commit.pr_url or commit.commit_url}", highlight=False)
    if json:
        result: dict[str, Any] = {"repository": repository, "commit": commit.oid, "url": commit.commit_url}
        emit(result | {"pull_request": commit.pr_url, "files": sizes, "towers": towers})


def where_towers_are(model: Writer, folder: Path) -> dict[str, str]:
    """In words, whether each tower's weights go along or are named by id."""
    if len(model.backbones()) == 1:
        return {" + ".join(model.names): "its weights go along"}
    where = {}
    for name, spec in model.config.tower_specs.items():
        if spec.train == "full":
            where[name] = "trained; its weights go along"
        elif (folder / "towers" / name).is_dir():
            where[name] = "bundled: its weights go along, under their own licence"
        else:
            where[name] = f"named, not uploaded: {spec.source} at {spec.revision or 'no recorded revision'}"
    return where
