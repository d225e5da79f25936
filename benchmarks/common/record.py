"""The record of a benchmark: where it was made, written anew after each part, and the last line of the output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from zipper_lm.utils.files import as_json, new_file
from zipper_lm.utils.machine import made_with


def begun(**facts: Any) -> dict[str, Any]:
    """A record with what it was made with, and how busy the machine was when it began."""
    return {**facts, "made_with": made_with(), "load_at_start": busy()}


def busy() -> float:
    """Processes that ran or waited to, mean over the last minute, this one included."""
    return round(os.getloadavg()[0], 2)


def keep(record: dict[str, Any], output: Path | None) -> None:
    """Write the record, whole, where it is wanted."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with new_file(output, overwrite=True) as file:
            file.write_text(as_json(record) + "\n", encoding="utf-8")


def finish(record: dict[str, Any], output: Path | None) -> None:
    """Write it a last time, and print it as one line."""
    record["load_at_end"] = busy()
    keep(record, output)
    print(as_json(record))
