"""Zipper: fuse independently pre-trained decoder language models into one multimodal model.

Names are imported when they are first asked for, so that `zipper --help` need not wait for torch. Asking for any of
them also registers the model with transformers' auto classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipper_lm.data.document import Document, Segment
    from zipper_lm.data.processor import ZipperProcessor
    from zipper_lm.fusion.config import TowerSpec, ZipperConfig, ZipSpec
    from zipper_lm.models.zipper import ZipperModel, ZipperOutput

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
    "Document": "data.document",
    "Segment": "data.document",
    "TowerSpec": "fusion.config",
    "ZipSpec": "fusion.config",
    "ZipperConfig": "fusion.config",
    "ZipperModel": "models.zipper",
    "ZipperOutput": "models.zipper",
    "ZipperProcessor": "data.processor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("zipper_lm.models.zipper")  # registers the auto classes
    value = getattr(importlib.import_module(f"zipper_lm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
