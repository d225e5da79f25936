"""The judge of a data set: a recogniser fitted on the training split's recordings, once, and cached."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zipper_lm.data.audio import read_audio
from zipper_lm.data.readers import read_rows
from zipper_lm.document import Document
from zipper_lm.evaluation.judge import Recogniser
from zipper_lm.files import new_folder

STEPS = 2500
"""Optimizer steps of a judge; on small data more passes, on large data fewer."""


def cache_folder() -> Path:
    """``$ZIPPER_CACHE``, else ``zipper`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(os.environ.get("ZIPPER_CACHE", str(Path(base) / "zipper")))


def judge_for(
    source: str,
    columns: Mapping[str, str] | None = None,
    *,
    split: str = "train",
    progress: Callable[[int, int, float], None] | None = None,
) -> Recogniser:
    """A recogniser fitted on real recordings of a data set's training split, independent of any model.

    Args:
        source, columns, split: as in `read_rows`.
        progress: called with (step, steps, loss) while fitting; not called if the judge is cached.

    Raises:
        ValueError: as `read_rows`, or without aligned speech and text.
    """
    rows = [row for row in read_rows(source, columns, split) if not isinstance(row, Document)]
    if not rows or not {"speech", "text"} <= set(rows[0]):
        raise ValueError(f"judge: {source} has no rows with speech and text in split {split!r} to fit one on")
    folder = cache_folder() / "judges" / _fingerprint(rows)
    if folder.is_dir():
        return Recogniser.from_pretrained(folder)
    waves = [read_audio(row["speech"]) for row in rows]
    epochs = max(1, round(STEPS * 16 / len(rows)))
    judge = Recogniser.fit(waves, [row["text"] for row in rows], epochs=epochs, progress=progress)
    with new_folder(folder, overwrite=True) as new:
        judge.save_pretrained(new)
    return judge


def _fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of what is said in which file; a path counts by its last two parts, so that a moved folder is the same."""
    digest = hashlib.sha256(str(STEPS).encode())
    for row in rows:
        value = row["speech"]
        name = "/".join(Path(value).parts[-2:]) if isinstance(value, (str, Path)) else _digest(value)
        digest.update(json.dumps([name, row["text"]]).encode())
    return digest.hexdigest()[:16]


def _digest(value: Any) -> str:
    """Of a sound that is no file: bytes, an array, or what holds them."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return hashlib.sha256(read_audio(value).tobytes()).hexdigest()
