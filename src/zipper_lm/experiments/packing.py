"""The records of an experiment as lines of JSON, and back: nothing is lost, and nothing is written twice.

- The first line holds the experiment, the recipe of the first run in full, and every list of references once.
- Each further line is a run, in the order in which they came: its record, in which the recipe is what differs from the
  first one's, references are the number of their list, and what was written exactly as the reference is `null`.

So a test split of 300 texts and a recipe of a hundred settings, which were nine tenths of a record, stand there once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from typing import Any

from zipper_lm.utils.json_files import parse_json

Plain = dict[str, Any]
"""A mapping as JSON has it."""


def pack(plan: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> str:
    """The text of a file of records.

    Args:
        plan: the experiment. records: of its runs. Both of plain finite values; `unpack` gives equal ones.
    """
    recipe: Plain | None = None
    references: list[list[str]] = []
    lines = []
    for record in records:
        line = dict(record)
        if "recipe" in record:
            recipe = record["recipe"] if recipe is None else recipe
            line["recipe"] = _difference(recipe, record["recipe"])
        line["scores"] = {task: _pack_score(score, references) for task, score in record["scores"].items()}
        lines.append(line)
    first = {"experiment": plan, "recipe": recipe, "references": references}
    return "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in [first, *lines])


def unpack(text: str) -> tuple[Plain, list[Plain]]:
    """The experiment and the records of a file of them.

    Raises:
        ValueError: with the number of a line that is damaged, or not of such a file.
    """
    # Not splitlines(): it knows ends of lines that JSON allows within a text.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line]
    if not lines:
        raise ValueError("line 1: it is empty")
    found, number = [], 1
    try:
        first = parse_json(lines[0][1], "it")
        plan, recipe, references = first["experiment"], first["recipe"], first["references"]
        for number, line in lines[1:]:  # noqa: B007 - told below
            record = parse_json(line, "it")
            if not {"run", "run_hash", "scores"} <= record.keys():
                raise ValueError("it lacks run, run_hash or scores")
            if "recipe" in record:
                record["recipe"] = _applied(recipe, record["recipe"])
            for score in record["scores"].values():
                _unpack_score(score, references)
            found.append(record)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"line {number}: no record of a run can be read from it: {error!r}") from error
    return plan, found


def _pack_score(score: Mapping[str, Any], references: list[list[str]]) -> Plain:
    packed = dict(score)
    if "references" in score:
        said = score["references"]
        if said not in references:
            references.append(said)
        packed["references"] = references.index(said)
        written = score["hypotheses"]
        packed["hypotheses"] = [None if a == b else b for a, b in zip(said, written, strict=True)]
    return packed


def _unpack_score(score: Plain, references: list[list[str]]) -> None:
    if "references" in score:
        said = references[score["references"]]
        score["references"] = list(said)
        score["hypotheses"] = [a if b is None else b for a, b in zip(said, score["hypotheses"], strict=True)]


def _difference(base: Plain, given: Plain) -> Plain:
    """What makes `given` of `base`: what is `changed`, nested as there, and the paths of what is `removed`."""
    return {"changed": _changed(base, given), "removed": _removed(base, given)}


def _changed(base: Plain, given: Plain) -> Plain:
    changed = {}
    for key, value in sorted(given.items()):  # in one order, whatever was written first: packed again it is the same
        old = base.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if inner := _changed(old, value):
                changed[key] = inner
        elif key not in base or json.dumps(old) != json.dumps(value):  # as text: to Python 1, 1.0 and true are equal
            changed[key] = value
    return changed


def _removed(base: Plain, given: Plain) -> list[list[str]]:
    paths = [[key] for key in sorted(base) if key not in given]
    for key, old in sorted(base.items()):
        if isinstance(old, dict) and isinstance(given.get(key), dict):
            paths += [[key, *path] for path in _removed(old, given[key])]
    return paths


def _applied(base: Plain, difference: Plain) -> Plain:
    made = copy.deepcopy(base)
    for *path, last in difference["removed"]:
        place = made
        for key in path:
            place = place[key]
        del place[last]
    _merge(made, difference["changed"])
    return made


def _merge(made: Plain, changed: Plain) -> None:
    for key, value in changed.items():
        if isinstance(value, dict) and isinstance(made.get(key), dict):
            _merge(made[key], value)
        else:
            made[key] = value
