"""Fields of a config: read out of JSON by their types, checked, and told by a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from functools import cache
from math import inf
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from zipper_lm.utils.places import public

Stream = Literal["stream"]
S = TypeVar("S")


def typed(kind: type[S], what: str, fields: dict[str, Any]) -> S:
    """A dataclass of fields out of JSON.

    Raises:
        ValueError: naming `what` and a field that is unknown, missing, or of another type.
    """
    if unknown := sorted(set(fields) - {f.name for f in dataclass_fields(kind)}):  # type: ignore[arg-type]
        raise ValueError(f"config: {what} has unknown fields {unknown}")
    types: Any = kind  # a dataclass can be kept by, which mypy does not see
    hints = field_types(types)
    for name, value in fields.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"config: {what}: {name} cannot be {type(value).__name__} {value!r:.60}")
    try:
        return kind(**fields)
    except TypeError as error:  # a field that has no default
        raise ValueError(f"config: {what}: {error}") from error


@cache
def field_types(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields by name. They are texts, and asked for by every document and every recipe."""
    return get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of a field's type."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any or origin is Literal:  # what is allowed is said where the field is checked
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inside)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(_fits(each, inside[0]) for each in value)
    return isinstance(value, origin or hint)


def one_of(where: str, value: Any, allowed: Any) -> None:
    """Raise `ValueError` that begins with `where`, for a value that a `Literal` does not allow."""
    if value not in get_args(allowed):
        raise ValueError(f"{where} must be one of {list(get_args(allowed))}, got {value!r}")


def check_scale(where: str, scale: Any) -> None:
    """Raise `ValueError` for what is neither ``"stream"``, nor a number above 0, nor, of a zip, a list of such."""
    numbers = scale if isinstance(scale, list) and where == "zip.scale" else [scale]
    if scale != "stream" and not (
        numbers and all(isinstance(n, (int, float)) and not isinstance(n, bool) and 0 < n < inf for n in numbers)
    ):
        several = ", or a list of such" if where == "zip.scale" else ""
        raise ValueError(f"{where} must be 'stream' or a number above 0{several}, got {scale!r:.60}")


def without_sets(value: Any) -> Any:
    """`value` with a sorted list for every set in it, which JSON has not and whose order changes."""
    if isinstance(value, Mapping):
        return {k: without_sets(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return [without_sets(v) for v in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """`value` as it comes back from a JSON file: keys are strings, tuples are lists."""
    return json.loads(json.dumps(value, default=str))


def config_fingerprint(value: Any) -> str:
    """SHA-256 of a value as JSON, as hex. Of a path only the last part counts, as no more of it is uploaded."""
    return hashlib.sha256(json.dumps(public(plain(value)), sort_keys=True).encode()).hexdigest()
