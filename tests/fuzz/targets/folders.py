"""Folders that were saved, of which one file is changed: the others are the same file under a second name."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fuzz.grammar import TEXTS, as_json, changed, damaged
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy


def link(saved: Path, folder: Path) -> None:
    """All files of a folder, in another."""
    for file in saved.rglob("*"):
        goal = folder / file.relative_to(saved)
        if file.is_dir():
            goal.mkdir(parents=True, exist_ok=True)
        else:
            goal.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, goal)


def replace(folder: Path, data: bytes) -> str:
    """Put an input in its place: the first line is the file's name, the rest is the file. Returns the name."""
    name, _, content = data.partition(b"\n")
    file = folder / name.decode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(content)
    return name.decode()


def changes(saved: Path, names: Sequence[str], words: Sequence[Any] = ()) -> SearchStrategy[bytes]:
    """One of a folder's JSON files with a few changes."""
    valid = {name: json.loads((saved / name).read_text()) for name in names}

    @st.composite
    def inputs(draw: DrawFn) -> bytes:
        name = draw(st.sampled_from(list(names)))
        own = sorted(set(_keys(valid[name])))
        texts = changed([valid[name]], [*own, *words]).map(as_json)
        return name.encode() + b"\n" + draw(damaged(texts, [json.dumps(t).encode() for t in TEXTS[:30]]))

    return inputs()


def _keys(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(key for each in value.values() for key in _keys(each))]
    return [key for each in value for key in _keys(each)] if isinstance(value, list) else []
