"""Classifier-free guidance: what a tower writes with its zips, pushed away from what it would write without them.

With c the zipped tower's log-probabilities and u those of the same tower alone, the next token is chosen by
``u + scale * (c - u)`` (Sanchez et al. 2023, arXiv 2306.17806, after Ho and Salimans 2022). A scale above 1
makes a tower keep closer to what the other towers say. It costs a second pass of the bare tower per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from zipper_lm.fusion.tower import Tower, alone


class Guidance(LogitsProcessor):
    """Mixes the bare tower's opinion into each step of `generate()`. Holds one request's cache, so use it once.

    Args:
        tower: the tower that speaks.
        scale: 1 leaves the zipped tower's probabilities as they are.
        mask: ``[batch, time]``, 1 for the prompt's tokens, 0 for its padding.
    """

    def __init__(self, tower: Tower, scale: float, mask: Tensor) -> None:
        self.tower, self.scale, self.mask = tower, scale, mask
        self.cache: Any = None
        self.read = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probabilities ``[batch, vocab]`` from `scores` of the same shape."""
        fresh = input_ids.shape[1] - self.mask.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), fresh)], 1)
        with alone(self.tower.layers):
            logits, self.cache = self.tower(
                input_ids[:, self.read :], mask, cache=self.cache, use_cache=self.tower.cache_name is not None
            )
        if self.cache is not None:
            self.read = input_ids.shape[1]
        bare, zipped = logits[:, -1].float().log_softmax(-1), scores.float().log_softmax(-1)
        return torch.where(zipped.isneginf(), zipped, bare + self.scale * (zipped - bare)).to(scores.dtype)
