"""All targets by name. Each is made when it is asked for, as some make models first."""

from __future__ import annotations

import functools
from importlib import import_module

from fuzz.target import Target

MODULES = {
    "recipes": "recipes",
    "documents": "documents",
    "checkpoints": "checkpoints",
    "codecs": "codecs",
    "prepared": "prepared",
    "settings": "settings",
    "server": "server",
    "realtime": "realtime",
    "sounds": "sounds",
    "pictures": "pictures",
    "tars": "tars",
    "tensors": "tensors",
    "shards": "shards",
}
BYTES = ("sounds", "pictures", "tars", "tensors", "shards")
"""Those whose inputs are bytes, led by coverage."""


@functools.cache
def target(name: str) -> Target:
    """The target of a name."""
    made: Target = import_module(f"fuzz.targets.{MODULES[name]}").make()
    return made
