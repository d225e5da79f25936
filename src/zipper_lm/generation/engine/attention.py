"""Attention of one query a row over columns that are there anyway, under a name of transformers' attention interface.

A captured step has a mask in any case, and one query for each row. So keys and values need not be repeated for heads
that share them.

R rows, H heads, G of them share keys and values of one of K = H / G, C columns, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zipper_lm.generation.engine.once import once

NAME = "zipper_step"
_OF_THE_MASK = {"is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions", "cache_position"}
"""What else a family may hand over, and what changes nothing for one query under its own mask."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend.

    Args:
        query: ``[R, H, 1, D]``. key, value: ``[R, K, C, D]``, the latter of any width. attention_mask: bool, true for
            what is seen, or added to scores, ``[R or 1, 1, 1, C]``. scaling: of scores; `None`: D ** -0.5. dropout: of
            none, as a step is in evaluation mode. more: as `_OF_THE_MASK`.

    Returns:
        ``[R, 1, H, D]``.

    Raises:
        TypeError: for anything else that a family asks for, such as sinks or a cap.
    """
    if asked := sorted(name for name, value in more.items() if value is not None and name not in _OF_THE_MASK):
        raise TypeError(f"attention with {asked}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    q = once(query[:, :, 0].unflatten(1, (key.shape[1], -1)) * scaling)  # [R, K, G, D]
    scores = (q @ key.transpose(-1, -2)).float()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1).to(value.dtype)  # [R, K, G, C]
    return (weights @ value).flatten(1, 2)[:, None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
