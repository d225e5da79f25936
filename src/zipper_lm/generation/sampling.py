"""The draw of the next token from a seed: what is drawn depends on the seed and the token's place, on nothing else.

A generator's state would depend on who else draws. Here every draw is a function of four numbers (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"): the seed, the number of the segment in its document, the place in the
segment and the id. So a document's tokens are the same alone, in a batch and beside others in an engine. The largest of
score and Gumbel noise is a draw from the softmax of the scores (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030).

R rows, V ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

MASK = 0xFFFFFFFF
NEVER = float("-inf")
SEEDS = 2**62
"""Seeds are whole numbers from 0 up to, not including, this."""


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (held in int64) that spreads every bit over all. Multipliers below 2**31 keep the
    products within int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x31848BAB) & MASK
    return x ^ (x >> 16)


def stream_key(seed: Tensor, *numbers: Tensor) -> Tensor:
    """One 32-bit number of a seed and whatever else tells draws apart, all int64 of one shape."""
    key = _mix(_mix(seed & MASK) ^ (seed >> 32))
    for number in numbers:
        key = _mix((key + 0x1E3779B9 + number) & MASK)
    return key


def gumbel(key: Tensor, size: int) -> Tensor:
    """Gumbel noise, float32 ``[R, size]``, of keys int64 ``[R]``."""
    ids = torch.arange(size, device=key.device)
    bits = _mix((_mix(ids + 1) + key[:, None]) & MASK)
    uniform = ((bits >> 9).float() + 0.5) / 2**23  # 24 bits: neither 0 nor 1 in float32
    return -torch.log(-torch.log(uniform))


def keep_likely(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Scores ``[R, V]`` with all that are too unlikely at minus infinity, as transformers' `TopKLogitsWarper`,
    `TopPLogitsWarper` and `MinPLogitsWarper` one after the other; the likeliest always stays.

    Args:
        scores: float32, at the temperature. top_k: int64 ``[R]``. top_p, min_p: float32 ``[R]``.
    """
    ordered = scores.sort(-1, descending=True).values
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    by_rank = ordered.masked_fill(ranks >= top_k[:, None], NEVER)
    share = by_rank.softmax(-1)
    within = (share.cumsum(-1) - share < top_p[:, None]) | (ranks == 0)
    least = ordered.masked_fill(~within | by_rank.isneginf(), float("inf")).amin(-1, keepdim=True)
    least = torch.maximum(least, ordered[:, :1] + min_p.log()[:, None])
    return scores.masked_fill(scores < least, NEVER)


@dataclass(frozen=True)
class Draw:
    """How one segment is drawn.

    Attributes:
        temperature: of the scores. top_k: ids that may be drawn; 0: all. top_p: their least probability together.
        min_p: least probability, as a share of the likeliest one's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @classmethod
    def of(cls, given: GenerationConfig) -> Draw:
        """From settings; what is not given is what transformers takes then."""
        without = GenerationConfig._get_default_generation_params()

        def said(key: str, off: float) -> float:
            value = getattr(given, key)
            value = without.get(key) if value is None else value
            return off if value is None else value

        return cls(
            float(said("temperature", 1.0)), int(said("top_k", 0)), float(said("top_p", 1.0)), float(said("min_p", 0.0))
        )

    @property
    def filters(self) -> bool:
        """Whether anything is too unlikely to be drawn."""
        return bool(self.top_k) or self.top_p < 1.0 or self.min_p > 0.0


class SeededDraw(LogitsProcessor):
    """Leaves the id that is drawn from a seed, and nothing else, to transformers' own sampling.

    Args:
        keys: int64 ``[R]``, of each row's seed and segment (`stream_key`). draw: how. start: where the segment begins,
            in tokens.
    """

    def __init__(self, keys: Tensor, draw: Draw, start: int) -> None:
        self.keys, self.draw, self.start = keys, draw, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[R, V]``: 0 for one id of each row, minus infinity for others."""
        rows, place = len(scores), input_ids.shape[1] - self.start
        scores = scores.float() / self.draw.temperature
        if self.draw.filters:
            like = torch.ones(rows, device=scores.device)
            top_k = (like * (self.draw.top_k or scores.shape[-1])).long()
            scores = keep_likely(scores, top_k, like * self.draw.top_p, like * self.draw.min_p)
        noise = gumbel(stream_key(self.keys, torch.full_like(self.keys, place)), scores.shape[-1])
        chosen = (scores + noise).argmax(-1, keepdim=True)
        return torch.full_like(scores, NEVER).scatter(1, chosen, 0.0)
