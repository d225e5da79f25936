"""Zipper: fuse independently pre-trained decoder language models into one multimodal model.

Names are imported when they are first asked for, so that `zipper --help` need not wait for torch. Asking for any of
them also registers the models with transformers' auto classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipper_lm.data.document import Document, Segment
    from zipper_lm.data.processor import ZipperProcessor
    from zipper_lm.fusion.config import ZipperConfig
    from zipper_lm.fusion.loss import ZipperOutput
    from zipper_lm.fusion.tower_spec import TowerSpec
    from zipper_lm.fusion.zip_spec import ZipSpec
    from zipper_lm.generation.engine.engine import Engine
    from zipper_lm.jobs.fuse import fuse
    from zipper_lm.jobs.recipes.reader import read_recipe
    from zipper_lm.jobs.recipes.schema import FuseRecipe
    from zipper_lm.models.baseline.single_decoder import SingleDecoder
    from zipper_lm.models.combine import combine
    from zipper_lm.models.load import load
    from zipper_lm.models.zipper import ZipperModel

__version__ = "0.1.0"

__all__ = [
    "Document",
    "Engine",
    "FuseRecipe",
    "Segment",
    "SingleDecoder",
    "TowerSpec",
    "ZipSpec",
    "ZipperConfig",
    "ZipperModel",
    "ZipperOutput",
    "ZipperProcessor",
    "combine",
    "fuse",
    "load",
    "read_recipe",
]

_HOMES = {
    "Document": "data.document",
    "Engine": "generation.engine.engine",
    "FuseRecipe": "jobs.recipes.schema",
    "Segment": "data.document",
    "SingleDecoder": "models.baseline.single_decoder",
    "TowerSpec": "fusion.tower_spec",
    "ZipSpec": "fusion.zip_spec",
    "ZipperConfig": "fusion.config",
    "ZipperModel": "models.zipper",
    "ZipperOutput": "fusion.loss",
    "ZipperProcessor": "data.processor",
    "combine": "models.combine",
    "fuse": "jobs.fuse",
    "load": "models.load",
    "read_recipe": "jobs.recipes.reader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("zipper_lm.models.load")  # registers the auto classes
    value = getattr(importlib.import_module(f"zipper_lm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
