"""What is changed in a tower's opinion of the next token: guidance, and when a segment ends.

Classifier-free guidance is what a tower writes with its zips, pushed away from what it would write without them. With c
the zipped tower's log-probabilities and u those of the same tower alone, the next token is chosen by
``u + scale * (c - u)`` (Sanchez et al. 2023, arXiv 2306.17806, after Ho and Salimans 2022). A scale above 1 makes a
tower keep closer to what the other towers say. It costs a second pass of the bare tower per token.

A segment can end by the probability of EOS itself, not by a race against every other token. In sound the next token is
one of many that would do, and each of them gets little probability. Greedy search then ends a segment as soon as EOS
beats the best single unit, although going on is far likelier than ending. So stopping can be made a decision of its
own, as in Tacotron 2 (Shen et al. 2018, arXiv 1712.05884, section 2.2: stop above 0.5).
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


class StopThreshold(LogitsProcessor):
    """EOS where it has at least this probability, and nowhere else.

    Args:
        threshold: above 0, at most 1.
        eos: the tower's EOS id.
    """

    def __init__(self, threshold: float, eos: int) -> None:
        self.threshold, self.eos = threshold, eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` ``[batch, vocab]`` with either EOS or all others at minus infinity."""
        stops = scores.float().softmax(-1)[:, self.eos] >= self.threshold
        is_eos = torch.arange(scores.shape[-1], device=scores.device) == self.eos
        return scores.masked_fill(is_eos != stops[:, None], float("-inf"))
