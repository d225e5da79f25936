"""The folder of a run that is not finished: its checkpoints, its logs, and the recipe it follows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zipper_lm.training.trainer import latest_checkpoint
from zipper_lm.utils.files import new_file, write_json
from zipper_lm.utils.json_files import read_mapping

RECIPE_FILE = "recipe.json"
FREE = ("overwrite", "judge", "output")
"""Keys of a recipe that may change between an interruption and its resumption."""


def working_folder(output: str | Path) -> Path:
    """Where a run that will write `output` keeps its checkpoints."""
    return beside(output, "training")


def beside(output: str | Path, suffix: str) -> Path:
    """The working folder of an output: its name, a dot and `suffix`, whether or not the name ends in a slash."""
    return Path(f"{Path(output)}.{suffix}")


def check_working(folder: Path, recipe: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, `None` to start anew. Nothing is changed.

    Args:
        folder: from `working_folder`. recipe: as plain values.
        resume: go on. overwrite: an interrupted run may be thrown away.

    Raises:
        ValueError: nothing to resume, another recipe than the interrupted run's, or an interrupted run or somebody
            else's folder in the way.
    """
    newest = latest_checkpoint(folder)
    if newest is None:
        check_ours(folder, RECIPE_FILE)
    if not resume:
        if newest is not None and not overwrite:
            raise ValueError(
                f"{folder} holds an interrupted run ({newest.name}): resume it (--resume), or start anew (--overwrite)"
            )
        return None
    if newest is None:
        raise ValueError(f"nothing to resume: no checkpoint in {folder}")
    file = folder / RECIPE_FILE
    before = read_mapping(file) if file.is_file() else dict(recipe)
    changed = sorted(k for k in {*before, *recipe} - {*FREE} if before.get(k) != _plain(recipe.get(k)))
    if changed:
        raise ValueError(f"cannot resume: the recipe's {changed} changed since {folder} was begun; put them back")
    return newest


def check_ours(folder: Path, mark: str) -> None:
    """Raise `ValueError` if a working folder, which is emptied before a run, holds things but not the file `mark`."""
    if folder.exists() and not (folder.is_dir() and ((folder / mark).is_file() or not any(folder.iterdir()))):
        raise ValueError(f"{folder} is in the way, and no run has begun it: move it, or choose another output")


def begin(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Start anew: an empty folder that knows its recipe."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with new_file(folder / RECIPE_FILE) as file:
        write_json(file, recipe)


def keep_logs(folder: Path, logs: Path) -> None:
    """TensorBoard's files move to `logs`."""
    for events in sorted(folder.rglob("events.out.tfevents.*")):
        logs.mkdir(exist_ok=True)
        shutil.copyfile(events, logs / events.name)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
