"""When a segment ends: by the probability of EOS itself, not by a race against every other token.

In sound the next token is one of many that would do, and each of them gets little probability. Greedy search then ends
a segment as soon as EOS beats the best single unit, although going on is far likelier than ending. So stopping can be
made a decision of its own, as in Tacotron 2 (Shen et al. 2018, arXiv 1712.05884, section 2.2: stop above 0.5).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor


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
