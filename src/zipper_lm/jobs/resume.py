"""The folder of a run that is not finished: its checkpoints, its logs, and the recipe it follows."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import EarlyStoppingCallback
from transformers.trainer import TRAINER_STATE_NAME

from zipper_lm.jobs.recipes.reader import build, to_mapping
from zipper_lm.jobs.recipes.schema import TowerRecipe
from zipper_lm.training.base import step_size
from zipper_lm.utils.files import as_json, new_file, new_folder, remove_folder, sweep, write_json
from zipper_lm.utils.json_files import read_json, read_mapping
from zipper_lm.utils.places import beside

logger = logging.getLogger(__name__)

RECIPE_FILE, DATA_FILE, START_FILE = "recipe.json", "data.json", "start.json"
SCORING = ("judge", "generation", "scored", "best_of", "best_by", "normaliser")
"""Keys of a recipe that say how it is scored."""
_KEPT = ("training.save_every", "towers.*.pretrain.training.save_every", "training.prefix_cache")
FREE = ("overwrite", "output", *SCORING, *_KEPT)
"""Keys of a recipe that may change between an interruption and its resumption: how it is scored, and what is kept; a
star is any name."""
STEP = ("training.batch_size", "training.arguments.gradient_accumulation_steps")
"""Keys of a recipe that may change with the number of processes: a checkpoint says how many documents a step has, and
`zipper_lm.training.base.check_step_size` holds the run to it."""
LAST_WRITTEN = TRAINER_STATE_NAME
"""What Trainer writes last; a checkpoint without it was cut off."""


def check_working(folder: Path, recipe: Any, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, `None` to start anew. Nothing is changed.

    Args:
        folder: from `working_folder`. recipe: a dataclass.
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
    before, now = _begun(folder, recipe), to_mapping(recipe)
    for plain in (before, now):
        for key in (*FREE, *(STEP if step_size(newest) else ())):
            _leave_out(plain, key.split("."))
        if plain.get("start") is not None:
            plain["towers"] = _but_places(plain["towers"])
    if changed := [key for key in sorted(now) if before[key] != now[key]]:
        raise ValueError(f"cannot resume: the recipe's {changed} changed since {folder} was begun; put them back")
    return newest


def scored_otherwise(folder: Path, recipe: Any) -> list[str]:
    """The keys of a recipe by which what a working folder holds was scored otherwise than it will be from now on."""
    before, now = _begun(folder, recipe), to_mapping(recipe)
    return [key for key in SCORING if key in now and before[key] != now[key]]


def forget_scores(folder: Path) -> None:
    """No checkpoint knows of a best one any more, or for how long there was no better one: what it was scored by is not
    what it will be scored by, and such scores cannot be compared. The logs keep them."""
    for _, checkpoint in sorted(_numbered(folder).items()):  # Trainer deletes those that were written to first
        if _lack(checkpoint) is not None:
            continue
        state = read_mapping(checkpoint / TRAINER_STATE_NAME)
        state |= dict.fromkeys(("best_metric", "best_global_step", "best_model_checkpoint"))
        if patience := state.get("stateful_callbacks", {}).get(EarlyStoppingCallback.__name__):
            patience["attributes"] = EarlyStoppingCallback().state()["attributes"]
        with new_file(checkpoint / TRAINER_STATE_NAME, overwrite=True) as file:
            write_json(file, state)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The whole checkpoint with the most steps in a training folder, or `None`."""
    return _checkpoints(Path(folder))[0]


def newest_from(folder: Path, start: str | None) -> Path | None:
    """The newest whole checkpoint of a run that was begun from a model `start`, or `None`."""
    file = folder / RECIPE_FILE
    begun = start is not None and file.is_file() and read_mapping(file).get("start") == start
    return latest_checkpoint(folder) if begun else None


def _checkpoints(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, if there is one, and what is wrong with those that are newer, or with all."""
    cut: list[str] = []
    for _, checkpoint in sorted(_numbered(folder).items(), reverse=True):
        if (reason := _lack(checkpoint)) is None:
            return checkpoint, cut
        cut.append(reason)
    return None, cut


def _numbered(folder: Path) -> dict[int, Path]:
    return {int(p.name[11:]): p for p in folder.glob("checkpoint-*") if p.name[11:].isdecimal() and p.is_dir()}


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


def begin(
    folder: Path,
    recipe: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | None = None,
) -> None:
    """Start anew: an empty folder that knows its recipe, what its data is, and which model it was started from, as soon
    as it is there."""
    with new_folder(folder, overwrite=True) as new:
        write_json(new / RECIPE_FILE, recipe)
        if data is not None:
            write_json(new / DATA_FILE, data)
        if start is not None:
            write_json(new / START_FILE, start)


def begun_from(folder: Path) -> dict[str, Any] | None:
    """What `begin` was told of the model that a run was started from: later that may be gone, or another one."""
    file = folder / START_FILE
    return read_mapping(file) if file.is_file() else None


def check_data(folder: Path, now: Mapping[str, Any]) -> None:
    """Raise `ValueError` if rows are not those that a working folder was begun with: what is done was learned from
    others. One that an older version began says nothing of them."""
    file = folder / DATA_FILE
    if not file.is_file():
        return
    before, plain = read_mapping(file), json.loads(as_json(now))
    if changed := sorted(name for name in {*before, *plain} if before.get(name) != plain.get(name)):
        raise ValueError(
            f"cannot resume: the rows of {changed} changed since {folder} was begun; put them back, or start anew "
            "(--overwrite)"
        )


def is_done(folder: Path, recipe: Any, steps: int) -> bool:
    """Whether a working folder is of this recipe, and its newest checkpoint of the last of the steps."""
    newest = latest_checkpoint(folder)
    if newest is None or not (folder / RECIPE_FILE).is_file():
        return False
    return newest.name == f"checkpoint-{steps}" and _begun(folder, recipe) == to_mapping(recipe)


def clear_done(output: str | Path, suffix: str = "training") -> None:
    """What a run left beside its output that was cut off after that was whole."""
    working = beside(output, suffix)
    remove_folder(working)
    if working.parent.is_dir():
        sweep(working.parent)


def keep_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """The recipe, as plain values, that a working folder follows from now on."""
    with new_file(folder / RECIPE_FILE, overwrite=True) as file:
        write_json(file, recipe)


def keep_logs(folder: Path, logs: Path) -> None:
    """TensorBoard's files move to `logs`."""
    for events in sorted(folder.rglob("events.out.tfevents.*")):
        logs.mkdir(exist_ok=True)
        shutil.copyfile(events, logs / events.name)


def _begun(folder: Path, recipe: Any) -> dict[str, Any]:
    """The recipe that a working folder follows, as plain values; what was no key yet when it was written has its
    default. A folder without one follows `recipe`."""
    file = folder / RECIPE_FILE
    if not file.is_file():
        return to_mapping(recipe)
    try:
        return to_mapping(build(type(recipe), read_mapping(file), str(file)))
    except ValueError as error:
        raise ValueError(f"cannot resume: {error}") from error


def _but_places(towers: Mapping[str, Any]) -> dict[str, Any]:
    """Towers beside a `start`, without where they are now: they may have been moved since, and are looked at when they
    are read. One of which nothing else is said counts as left out."""
    plain, places = to_mapping(TowerRecipe()), ("source", "revision")
    said = {name: {k: v for k, v in tower.items() if k not in places} for name, tower in towers.items()}
    return {name: tower for name, tower in said.items() if any(v != plain[k] for k, v in tower.items())}


def _leave_out(plain: Any, path: Sequence[str]) -> None:
    """Take a key of `FREE` out of plain values."""
    if not isinstance(plain, dict):
        return
    first, *rest = path
    if not rest:
        plain.pop(first, None)
        return
    for inner in plain.values() if first == "*" else [plain.get(first)]:
        _leave_out(inner, rest)
