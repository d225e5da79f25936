"""Whether a backbone is a decoder is not read off its name: it is tried."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zipper_lm.fusion.interface import embedding_of, is_quantized, logits_of, plain_ids, trial
from zipper_lm.utils.shapes import has_values

LENGTH = 5
"""Tokens of the trial."""

NOISE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Share of the largest logit by which a token's may differ, for the order of sums alone."""

COARSE = 0.05
"""The same in half precision, and where weights are quantized, whatever the other parameters are."""


def check_causal(what: str, backbone: nn.Module) -> None:
    """Raise `ValueError` if a backbone lets a token see later ones, as encoders do, or gives no logits for each token.

    It is tried on a row of ids, and on one that differs from it in the last. One without values is not tried.

    Args:
        what: whose it is, for the message. backbone: with a language-model head.
    """
    if not has_values(embedding_of(backbone)):
        return
    ids = plain_ids(backbone, 2, LENGTH)
    row, changed = ids[:1], ids[:1].clone()
    changed[0, -1] = ids[1, 0]
    both = _logits(backbone, torch.cat([row, changed]))
    kind = type(backbone).__name__
    if both.ndim != 3 or both.shape[:2] != (2, LENGTH):
        raise ValueError(
            f"{what}: {kind} gives {list(both.shape)} for 2 rows of {LENGTH} tokens, no logits for each of them: it "
            "has another head than a language model's"
        )
    if not _alike(backbone, both) and not _alike(
        backbone, torch.cat([_logits(backbone, ids) for ids in (row, changed)])
    ):
        raise ValueError(
            f"{what}: in {kind} a token sees later ones, as in an encoder; a tower must be a decoder (of BERT and its "
            "kin: one trained with is_decoder=True)"
        )


def _alike(backbone: nn.Module, both: Tensor) -> bool:
    """Whether two rows' logits are, but for the last."""
    before, after = both[:, :-1].float()
    tolerance = COARSE if is_quantized(backbone) else NOISE.get(next(backbone.parameters()).dtype, COARSE)
    return not (after - before).abs().max() > tolerance * before.abs().max()


def _logits(backbone: nn.Module, ids: Tensor) -> Tensor:
    with trial(backbone):  # each with the same random state: some families draw in evaluation mode, too
        return logits_of(backbone, ids)
