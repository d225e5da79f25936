"""What is changed in a tower's opinion of the next token: guidance, and when a segment ends.

Classifier-free guidance is what a tower writes with its zips, pushed away from what it would write without them. With c
the zipped tower's log-probabilities and u those of the same tower alone, the next token is chosen by
``u + scale * (c - u)`` (Sanchez et al. 2023, arXiv 2306.17806, after Ho and Salimans 2022). A scale above 1 makes a
tower keep closer to what the other towers say. It costs a second pass of the bare tower per token.

A segment can end by the probability of EOS itself, not by a race against every other token. In sound the next token is
one of many that would do, and each of them gets little probability. Greedy search then ends a segment as soon as EOS
beats the best single unit, although going on is far likelier than ending. So stopping can be made a decision of its
own, as in Tacotron 2 (Shen et al. 2018, arXiv 1712.05884, section 2.2: stop above 0.5). Or it ends with a string.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from zipper_lm.codecs.text import TextCodec
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
            logits, self.cache = self.tower(input_ids[:, self.read :], mask, cache=self.cache, use_cache=True)
        if self.cache is not None:
            self.read = input_ids.shape[1]
        bare, zipped = logits[:, -1].float().log_softmax(-1), scores.float().log_softmax(-1)
        return torch.where(zipped.isneginf(), zipped, bare + self.scale * (zipped - bare)).to(scores.dtype)


class Suppression(LogitsProcessor):
    """Ids that are never written. In place, for `generate()` hands over scores that are its own.

    Args:
        ids: within the tower's head. device: where its scores are.
    """

    def __init__(self, ids: Sequence[int], device: torch.device) -> None:
        self.ids = torch.tensor(sorted(ids), dtype=torch.long, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill_(-1, self.ids.to(scores.device), -math.inf)


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


class StopStrings(StoppingCriteria):
    """Ends a row whose text holds one of the strings.

    Not transformers' own, which fails with a small tokenizer: it has each token spelled behind "abcdef".

    Args:
        strings: to stop at. codec: of the text. start: where the segment begins, in tokens. offset: what an id of the
            codec's first token is.
    """

    def __init__(self, strings: Sequence[str], codec: TextCodec, start: int, offset: int = 0) -> None:
        self.strings, self.codec, self.start, self.offset = strings, codec, start, offset

    @classmethod
    def taken_from(
        cls, given: GenerationConfig, name: str, codec: Any, start: int, offset: int = 0
    ) -> list[StopStrings]:
        """What the settings of a modality ask for, at most one; taken out of them.

        Raises:
            ValueError: if its codec is none of text.
        """
        strings, given.stop_strings = given.stop_strings, None
        if strings is None:
            return []
        if not isinstance(codec, TextCodec):
            raise ValueError(f"settings for {name!r}: stop_strings needs a codec of text, and {name!r} has none")
        return [cls([strings] if isinstance(strings, str) else strings, codec, start, offset)]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """bool ``[batch]``, of ids ``[batch, time]``."""
        return torch.tensor(self.end((input_ids[:, self.start :] - self.offset).tolist()), device=input_ids.device)

    def end(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each of some rows, the codec's ids from the segment's beginning, has one of the strings."""
        known = range(self.codec.vocab_size)
        texts = self.codec.decode([[i for i in row if i in known] for row in rows])
        return [any(s in text for s in self.strings) for text in texts]
