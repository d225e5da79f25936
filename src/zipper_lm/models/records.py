"""The records beside a model: how it was made, how it writes, and what it scored.

Scores are a list of entries in `results.json`, one for each thing that was asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zipper_lm.utils.files import new_file, write_json
from zipper_lm.utils.hub import WEIGHTS_FILE
from zipper_lm.utils.json_files import read_json, read_mapping

RUN_FILE = "run.json"
GENERATION_FILE = "generation.json"
RESULTS_FILE = "results.json"
ASKED = (
    "weights",
    "data",
    "split",
    "template",
    "column",
    "where",
    "limit",
    "set",
    "seed",
    "judge",
    "best_of",
    "best_by",
    "normaliser",
    "dtype",
)
"""Fields that say what was asked; an entry replaces the one that agrees in all of them."""


def weights_digest(folder: str | Path) -> str:
    """SHA-256 of a checkpoint's `model.safetensors`, as hex: it ties a record to the weights it is about."""
    with (Path(folder) / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_results(folder: str | Path) -> list[dict[str, Any]]:
    """The entries kept in a model's folder; empty if there are none.

    Raises:
        ValueError: if `results.json` is no list of mappings.
    """
    file = Path(folder) / RESULTS_FILE
    if not file.is_file():
        return []
    entries = read_json(file)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file}: expected a list of results; move it away to have a new one written")
    return entries


def add_result(folder: str | Path, entry: Mapping[str, Any]) -> None:
    """Add an entry to a model's `results.json`; the file is written whole, and no other entry is lost.

    Raises:
        ValueError: if what is there cannot be read, or the folder cannot be written to.
    """
    asked = [entry.get(field) for field in ASKED]
    kept = [e for e in read_results(folder) if [e.get(field) for field in ASKED] != asked]
    with new_file(Path(folder) / RESULTS_FILE, overwrite=True) as file:
        write_json(file, [*kept, dict(entry)])


def generation_settings(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The generation settings kept with a model, per modality; empty if there are none.

    Raises:
        ValueError: if the file cannot be read, or holds anything else.
    """
    file = Path(folder) / GENERATION_FILE
    kept = read_mapping(file) if file.is_file() else {}
    if wrong := [name for name, given in kept.items() if not isinstance(given, dict)]:
        raise ValueError(f"{file}: settings of {wrong[0]!r} must be a mapping, got {kept[wrong[0]]!r:.80}")
    return kept


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep a model's generation settings beside it, if it has any."""
    if settings:
        write_json(folder / GENERATION_FILE, settings)
