"""The folder of a run that is not finished: its checkpoints, its logs, and the recipe it follows."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

from zipper_lm.utils.files import new_file, write_json
from zipper_lm.utils.json_files import read_json, read_mapping

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.json"
FREE = ("overwrite", "output", "judge", "generation", "scored", "best_of", "best_by", "training.save_every")
"""Keys of a recipe that may change between an interruption and its resumption: how it is scored, and what is kept."""
LAST_WRITTEN = TRAINER_STATE_NAME
"""What Trainer writes last; a checkpoint without it was cut off."""


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
    newest, cut = _checkpoints(folder)
    if newest is None:
        check_ours(folder, RECIPE_FILE)
    if not resume:
        if newest is not None and not overwrite:
            raise ValueError(
                f"{folder} holds an interrupted run ({newest.name}): resume it (--resume), or start anew (--overwrite)"
            )
        return None
    if newest is None:
        not_whole = f" that is whole: {'; '.join(cut)}" if cut else ""
        raise ValueError(f"nothing to resume: no checkpoint in {folder}{not_whole}")
    for reason in cut:
        logger.warning("going on from %s: %s", newest.name, reason)
    file = folder / RECIPE_FILE
    before, now = _fixed(read_mapping(file) if file.is_file() else recipe), _fixed(recipe)
    if changed := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
        raise ValueError(f"cannot resume: the recipe's {changed} changed since {folder} was begun; put them back")
    return newest


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The whole checkpoint with the most steps in a training folder, or `None`."""
    return _checkpoints(Path(folder))[0]


def _checkpoints(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, if there is one, and what is wrong with those that are newer, or with all."""
    numbered = {int(p.name[11:]): p for p in folder.glob("checkpoint-*") if p.name[11:].isdecimal() and p.is_dir()}
    cut: list[str] = []
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        if (reason := _lack(checkpoint)) is None:
            return checkpoint, cut
        cut.append(reason)
    return None, cut


def _lack(checkpoint: Path) -> str | None:
    """Which file of a checkpoint is missing or not whole, as a process leaves it that is killed while it writes, or a
    machine whose power fails; `None` if there is none. No tensor is read."""
    if not (checkpoint / LAST_WRITTEN).is_file():
        return f"{checkpoint} has no {LAST_WRITTEN}: it was cut off"
    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".json":
                read_json(file)
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="np"):  # holds the length against the header
                    pass
            elif file.suffix in (".pt", ".pth"):
                zipfile.ZipFile(file).close()  # the directory of a zip file is at its end
        except (ValueError, OSError, SafetensorError, zipfile.BadZipFile):
            return f"{file} is not whole"
    return None


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


def _fixed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as JSON gives it back, without what may change."""
    plain = json.loads(json.dumps(recipe))
    for key in FREE:
        *path, last = key.split(".")
        inner = plain
        for part in path:
            inner = inner.get(part, {})
        inner.pop(last, None)
    return plain
