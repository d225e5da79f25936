"""YAML with the scalars of its version 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema).

``1e-3`` is a number; ``no``, ``on``, ``1:30`` and ``2024-01-01`` are plain text. PyYAML by itself follows version
1.1, which reads each of these another way. An alias counts as all that it stands for, before anything is made of it.
"""

from __future__ import annotations

import re
from copy import deepcopy
from functools import lru_cache
from typing import Any

import yaml

MAX_VALUES = 100_000
"""Scalars, lists and mappings that a text may stand for, those behind aliases counted each time."""

MAX_DEPTH = 100
"""How deep lists and mappings may lie in each other."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of version 1.2, refusing keys that come twice and aliases that multiply."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own form)

    def get_single_node(self) -> yaml.Node | None:
        """The document's node, from which values are made next: here aliases are links still, and cost nothing."""
        node = super().get_single_node()
        if node is not None:
            _extent(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # what `<<` brings in may be set again: that is its use
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} comes twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _extent(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node stands for, and how deep they lie. Each node is looked at once, however many aliases lead
    to it, so that a few lines which stand for millions of values ("billion laughs") are told by counting."""
    if (found := known.get(id(node), (0, 0))) is None:
        raise yaml.constructor.ConstructorError(None, None, "an alias stands for what it lies in", node.start_mark)
    if found != (0, 0):
        return found
    known[id(node)] = None
    inside = node.value if isinstance(node.value, list) else []
    parts = [part for entry in inside for part in (entry if isinstance(entry, tuple) else (entry,))]
    extents = [_extent(part, known) for part in parts]
    values = 1 + sum(extent[0] for extent in extents)
    depth = (1 if isinstance(node.value, list) else 0) + max((extent[1] for extent in extents), default=0)
    for what, count, limit in (
        ("values, with those that aliases stand for", values, MAX_VALUES),
        ("levels", depth, MAX_DEPTH),
    ):
        if count > limit:
            raise yaml.constructor.ConstructorError(None, None, f"more than {limit} {what}", node.start_mark)
    known[id(node)] = values, depth
    return values, depth


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+|[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_value(text: str, where: str) -> Any:
    """A value as it is written in YAML 1.2, the caller's own. Raises `ValueError` that begins with `where`."""
    try:
        return deepcopy(_parsed(text))
    except Exception as error:  # PyYAML's own, and whatever a value raises that is not of its tag, such as `!!bool x`
        raise ValueError(f"{where}: not readable as YAML: {error}") from error


@lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    """Kept: an experiment reads one recipe, and the same few settings, for each of its runs."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: it makes plain values only
