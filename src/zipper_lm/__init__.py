"""Zipper: fuse independently pre-trained decoder language models into one multimodal model."""

__version__ = "0.1.0"
