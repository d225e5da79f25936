"""What the files beside a model say of it, and what it is made of."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zipper_lm.data.tasks import Task, parse_task
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.models.records import GENERATION_FILE, RESULTS_FILE, RUN_FILE, read_results, weights_digest
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.places import is_hub_id, public

logger = logging.getLogger(__name__)
PICTURE_FILE = "architecture.png"


class Records:
    """What the files beside a model say of it, without the places of this machine.

    Args:
        folder: with config and weights. kept: with the records; those of other weights are left out.
        config: class of the config.
    """

    def __init__(self, folder: Path, kept: Path, config: Any) -> None:
        self.folder = folder
        self.specs: dict[str, TowerSpec] = config.from_pretrained(folder).tower_specs
        """As saved: where the weights are now."""
        run = mapping_if_whole(kept / RUN_FILE)
        weights = weights_digest(folder) if run or (kept / RESULTS_FILE).is_file() else None
        self.run = public(run) if run.get("weights") == weights else {}
        self.results: list[dict[str, Any]] = []
        try:
            self.results = [public(entry) for entry in read_results(kept) if entry.get("weights") == weights]
        except ValueError as error:  # as in `mapping_if_whole`
            logger.warning("left out of the model card: %s", error)
        self.generation = mapping_if_whole(kept / GENERATION_FILE)

    @property
    def recipe(self) -> dict[str, Any]:
        """As it was trained; empty if that is unknown."""
        return self.run.get("recipe", {})

    @property
    def tasks(self) -> list[Task]:
        """Those that were trained and are given something, the weightiest first."""
        weights = self.recipe.get("tasks", {})
        found = [parse_task(t) for t in sorted(weights, key=lambda t: -weights[t]) if weights[t] > 0]
        return [task for task in found if task.given]

    def other_dtype(self, entry: Mapping[str, Any]) -> str | None:
        """The dtype that a score was asked for in, if the towers are stored in another one."""
        asked = str(entry.get("dtype") or "auto").removeprefix("torch.")
        stored = {(spec.backbone or {}).get("dtype") or "float32" for spec in self.specs.values()}
        return None if asked == "auto" or stored == {asked} else asked


def mapping_if_whole(file: Path) -> dict[str, Any]:
    """Nothing of what is not there. Nothing either, but a warning, of what cannot be read: a file of another origin is
    no reason not to save a model."""
    if not file.is_file():
        return {}
    try:
        return read_mapping(file)
    except ValueError as error:
        logger.warning("left out of the model card: %s", error)
        return {}


def is_bundled(name: str, spec: TowerSpec) -> bool:
    """Whether a frozen tower's weights lie in the checkpoint too."""
    return spec.source == f"towers/{name}"


def on_hub(spec: TowerSpec) -> bool:
    """What was read from the Hub has its commit recorded; a relative path that is gone only looks like an id."""
    return spec.revision is not None and is_hub_id(spec.source)


def elsewhere(records: Records) -> dict[str, TowerSpec]:
    """Towers whose weights are not in the folder."""
    return {n: s for n, s in records.specs.items() if s.train != "full" and s.source and not is_bundled(n, s)}
