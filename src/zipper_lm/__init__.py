"""Zipper: fuse independently pre-trained decoder language models into one multimodal model.

Names are imported when they are first asked for, so that `zipper --help` need not wait for torch. Asking for any of
them also registers the model with transformers' auto classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipper_lm.config import TowerSpec, ZipperConfig, ZipSpec
    from zipper_lm.document import Document, Segment
    from zipper_lm.model import ZipperModel, ZipperOutput
    from zipper_lm.processor import ZipperProcessor

__version__ = "0.1.0"

__all__ = [
    "Document",
    "Segment",
    "TowerSpec",
    "ZipSpec",
    "ZipperConfig",
    "ZipperModel",
    "ZipperOutput",
    "ZipperProcessor",
]

_HOMES = {
    "Document": "document",
    "Segment": "document",
    "TowerSpec": "config",
    "ZipSpec": "config",
    "ZipperConfig": "config",
    "ZipperModel": "model",
    "ZipperOutput": "model",
    "ZipperProcessor": "processor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("zipper_lm.model")  # registers the auto classes
    importlib.import_module("zipper_lm.processor")
    value = getattr(importlib.import_module(f"zipper_lm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
