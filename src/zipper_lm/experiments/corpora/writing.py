"""The form that the corpora here are written in: a JSONL file a split, and a folder of its sounds or pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from zipper_lm.utils.files import as_json, new_folder
from zipper_lm.utils.progress import barred, plain_console


def write_corpus(
    folder: str | Path,
    splits: Mapping[str, Iterable[tuple[Any, dict[str, Any]]]],
    modality: str,
    suffix: str,
    writer: Any,
    more: Mapping[str, Iterable[dict[str, Any]]] | None = None,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, int]:
    """Write ``SPLIT.jsonl``, whose rows name a file in ``SPLIT/``; the folder appears whole or not at all.

    Args:
        folder: to be made. splits: name to pairs of a value and the other fields of its row.
        modality: field that names the file. suffix: of the files. writer: called with (path, value).
        more: rows without such a file, by the path of their own JSONL file, without its ending.
        overwrite: replace what is at `folder`. console: where bars are; `None` is standard error.

    Returns:
        Rows in each split.

    Raises:
        ValueError: if `folder` exists and `overwrite` is false, or it cannot be written.
    """
    counts = {}
    with new_folder(folder, overwrite) as new, ExitStack() as open_files:
        for path, others in (more or {}).items():
            (new / path).parent.mkdir(exist_ok=True)
            _write_lines(new / path, others)
        for split, rows in splits.items():
            (new / split).mkdir()
            lines = open_files.enter_context((new / f"{split}.jsonl").open("w", encoding="utf-8"))
            counts[split] = 0
            for value, fields in barred(rows, console or plain_console(stderr=True), split):
                name = f"{split}/{counts[split]:05d}{suffix}"
                writer(new / name, value)
                lines.write(as_json({modality: name, **fields}) + "\n")
                counts[split] += 1
    return counts


def write_rows(
    folder: str | Path, splits: Mapping[str, Iterable[dict[str, Any]]], *, overwrite: bool = False
) -> dict[str, int]:
    """Write ``SPLIT.jsonl`` of rows that need no files; the folder appears whole or not at all.

    Args:
        folder: to be made. splits: name to rows. overwrite: replace what is at `folder`.

    Returns:
        Rows in each split.

    Raises:
        ValueError: if `folder` exists and `overwrite` is false, or it cannot be written.
    """
    counts = {}
    with new_folder(folder, overwrite) as new:
        for split, rows in splits.items():
            counts[split] = _write_lines(new / split, rows)
    return counts


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """As JSONL; how many they are."""
    lines = [as_json(row) + "\n" for row in rows]
    path.with_name(f"{path.name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)
