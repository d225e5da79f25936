"""Zipper: fuse independently pre-trained decoder language models into one multimodal model."""

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
