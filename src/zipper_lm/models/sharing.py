"""Sharing: a model as others shall find it on the Hub. Checked, staged in a folder, then uploaded as one commit.

Frozen towers that have a Hub id stay where they are; those in a folder of this machine go along, as nobody else
has that folder. No path of this machine is uploaded.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi, get_token, is_offline_mode
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.models.card import PICTURE_FILE, is_edited, refresh_card
from zipper_lm.models.records import GENERATION_FILE, RESULTS_FILE, RUN_FILE
from zipper_lm.utils.arguments import PUSHING, Saving, refuse
from zipper_lm.utils.files import write_json
from zipper_lm.utils.hub import CONFIG_FILE
from zipper_lm.utils.json_files import read_json
from zipper_lm.utils.places import each_text, public

if TYPE_CHECKING:
    from zipper_lm.generation.writer import Writer


def push(
    model: Writer,
    repo_id: str,
    *,
    kept: str | Path | None = None,
    bundle_towers: bool | Collection[str] = False,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    **others: Any,
) -> CommitInfo:
    """Upload a model.

    Args:
        model: the model. repo_id: ``"owner/name"``; without an owner it is yours.
        kept, bundle_towers: see `staged`. others: what else `push_to_hub` of transformers takes, which is refused. The
            rest: see `upload`.

    Raises:
        ValueError: as `check_target`, `staged` and `upload`; for an argument that is not followed.
    """
    refuse("push_to_hub", others, PUSHING)
    repo_id = check_target(repo_id, token)
    with staged(model, repo_id, kept=kept, bundle_towers=bundle_towers) as folder:
        return upload(
            folder,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload a zipped model",
            commit_description=commit_description,
        )


def push_saved(model: Writer, folder: Path, how: Saving, bundle_towers: bool | Collection[str]) -> None:
    """Upload what `save_pretrained` wrote into a folder, if that was asked for; its name there is the folder's."""
    if how.push:
        to = {"repo_id": folder.resolve().name, **(how.upload or {})}
        push(model, kept=folder, bundle_towers=bundle_towers, **to)


def check_target(repo_id: str, token: bool | str | None = None) -> str:
    """Whether there can be an upload at all, before any work.

    Returns:
        The id with its owner.

    Raises:
        ValueError: for an id that the Hub does not allow, without a token, or in offline mode.
    """
    validate_repo_id(repo_id)
    if is_offline_mode():
        raise ValueError(f"push to {repo_id!r}: offline mode is on (HF_HUB_OFFLINE)")
    if not isinstance(token, str) and get_token() is None:
        raise ValueError(f"push to {repo_id!r}: no token here; log in with hf auth login, or set HF_TOKEN")
    if "/" in repo_id:
        return repo_id
    with _clearly(repo_id):
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


@contextmanager
def staged(
    model: Writer, repo_id: str, *, kept: str | Path | None = None, bundle_towers: bool | Collection[str] = False
) -> Iterator[Path]:
    """A folder that holds what is to be uploaded, for the span of the block.

    Args:
        model: the model. repo_id: what its card tells readers to load.
        kept: a folder that may hold an edited card, `run.json`, `results.json` and `generation.json` of this model.
        bundle_towers: also store the frozen towers that have a Hub id, all or those named. Mind their licences.

    Raises:
        ValueError: for a trained tower whose own code nobody else has, or a record that cannot be read.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        _save(model, folder, bundle_towers)
        kept = folder if kept is None else Path(kept)
        for name in (GENERATION_FILE, RUN_FILE, RESULTS_FILE):
            if kept != folder and (kept / name).is_file():
                shutil.copyfile(kept / name, folder / name)
        if is_edited(kept / REPOCARD_NAME):
            for name in (REPOCARD_NAME, PICTURE_FILE):
                if (kept / name).is_file():
                    shutil.copyfile(kept / name, folder / name)
        else:
            refresh_card(folder, model, name=repo_id)
        for name, change in ((CONFIG_FILE, _without_sources), (RUN_FILE, _only_counted), (RESULTS_FILE, public)):
            _rewrite(folder / name, change)
        for file in folder.glob(f"towers/*/{CONFIG_FILE}"):
            _rewrite(file, public)
        yield folder


def _save(model: Any, folder: Path, bundle_towers: bool | Collection[str]) -> None:
    specs = model.config.tower_specs
    for name, spec in specs.items():
        if spec.trust_remote_code and _is_here(spec):
            raise ValueError(
                f"tower {name!r} runs code of its own from a folder of this machine: nobody else has it. Upload the "
                "tower first, and fuse from its id"
            )
    frozen = [name for name, spec in specs.items() if spec.train != "full"]
    chosen = (frozen if bundle_towers else ()) if isinstance(bundle_towers, bool) else bundle_towers
    model.save_pretrained(folder, bundle_towers=[n for n in frozen if n in chosen or _is_here(specs[n])], card=False)


def _is_here(spec: TowerSpec) -> bool:
    return Path(spec.source).is_absolute()


def _without_sources(config: Any) -> Any:
    """Of a tower's source on this machine nothing is left, as its last part would be taken for another place."""
    for spec in (*config.get("towers", {}).values(), config.get("decoder", {})):
        if Path(spec.get("source", "")).is_absolute():
            spec["source"] = ""
    return public(config)


def _only_counted(run: Any) -> Any:
    """Of the items that were left out only how many, as they are known by their paths; of relative paths, too, only the
    last part."""
    if not isinstance(run, dict):
        return public(run)
    if isinstance(run.get("broken"), list):
        run["broken"] = len(run["broken"])
    paths = set(run.pop("relative_paths", None) or ())
    return public(each_text(run, lambda text: Path(text).name if text in paths else text))


def _rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    if not file.is_file():
        return
    try:
        content = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file.name} beside the model is not readable as JSON: {error}") from error
    write_json(file, change(content))


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a zipped model",
    commit_description: str | None = None,
) -> CommitInfo:
    """Upload a staged folder as one commit; the repository is made if it is not there.

    A card that somebody edited on the Hub stays, unless the folder's own was edited. Towers, codecs and records of
    an earlier upload that are not in the folder are removed.

    Args:
        folder: from `staged`. repo_id: with its owner. private: a new repository's visibility; `None` is its owner's
            default; true is refused for one that is there and public. token: a token, or whether the stored one is
            used. revision: branch, made if it is not there. create_pr: open a pull request instead.
        commit_message, commit_description: of the commit.

    Raises:
        ValueError: if the Hub cannot be reached or refuses, or the repository is public and shall be private.
    """
    api = HfApi(token=token)
    with _clearly(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.repo_info(repo_id).private:  # one that was there keeps its visibility
            raise ValueError("private was asked for, but the repository is there and public; nothing was uploaded")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        leave_card = not is_edited(folder / REPOCARD_NAME) and _edited_there(api, repo_id, revision)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[REPOCARD_NAME] if leave_card else None,
            delete_patterns=["towers/*", "codecs/*", GENERATION_FILE, RUN_FILE, RESULTS_FILE],
        )


def _edited_there(api: HfApi, repo_id: str, revision: str | None) -> bool:
    try:
        return is_edited(Path(api.hf_hub_download(repo_id, REPOCARD_NAME, revision=revision)))
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return False


@contextmanager
def _clearly(repo_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # huggingface-hub and httpx each have their own kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"push to {repo_id!r}: {first}") from error
