"""Read JSON that somebody else may have written: bounded in size and depth, and every complaint names the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20
"""Of one file: what is read here describes something, it is no data set."""

MAX_DEPTH = 100
"""How deep lists and mappings may lie in each other: whatever walks a value calls itself at each level."""


def read_json(file: str | Path) -> Any:
    """The value that a file holds.

    Raises:
        ValueError: naming the file, if it is missing, too large, no UTF-8 text, no JSON, or nested too deeply.
    """
    file = Path(file)
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{file}: has {size} bytes, more than the limit of {MAX_BYTES}")
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}") from error
    return parse_json(content, str(file))


def read_mapping(file: str | Path) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        ValueError: as `read_json`, and if the file holds anything else.
    """
    value = read_json(file)
    if not isinstance(value, dict):
        raise ValueError(f"{file}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def parse_json(content: str | bytes, where: str) -> Any:
    """The value that a text is.

    Args:
        content: bytes are UTF-8. where: the place that messages begin with.

    Raises:
        ValueError: if it is no UTF-8 text, no JSON, or nested too deeply.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where}: {_TOO_DEEP}") from error
    except ValueError as error:  # also of no UTF-8, and of numbers with thousands of digits
        raise ValueError(f"{where}: malformed JSON: {error}") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise ValueError(f"{where}: {_TOO_DEEP}")
    return value


_TOO_DEEP = f"malformed JSON: nested more than {MAX_DEPTH} deep"


def _depth(value: Any) -> int:
    """How deep lists and mappings lie in each other, as far as `MAX_DEPTH` + 1; level by level, not by recursion."""
    depth, level = 0, [value]
    while depth <= MAX_DEPTH and (inside := [v for v in level if isinstance(v, dict | list)]):
        depth += 1
        level = [v for each in inside for v in (each.values() if isinstance(each, dict) else each)]
    return depth
