"""Whether a backbone reads documents that share a row as each alone. It is tried.

transformers makes block masks, sliding windows included, where positions begin anew within a row and no mask is given;
so documents are told apart by their positions alone, and whatever attends by its interface follows: eager, SDPA, and
FlexAttention by a block mask. A recurrent state, a short convolution, or a family with masks of its own runs on from
one document into the next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zipper_lm.data.packing import places
from zipper_lm.fusion.interface import COARSE, FINE, Interface, embedding_of, is_quantized, plain_ids, trial
from zipper_lm.utils.shapes import has_values

LAYOUT = ((0, 0, 0, 0, 1, 1, 1), (2, 2, 3, 3, 3, 3, -1))
"""The document of each token of the trial; two rows, as some ways to attend look for documents in a single one only."""


def check_packing(what: str, backbone: nn.Module, interface: Interface) -> None:
    """Raise `ValueError` if a backbone does not read documents that share a row as each alone.

    Args:
        what: whose it is, for the message. backbone: with a language-model head; without values it is not tried.
        interface: how it is called.
    """
    if fault := _fault(backbone, interface):
        raise ValueError(f"training.packing: {what}: {type(backbone).__name__} {fault}; leave training.packing out")


def _fault(backbone: nn.Module, interface: Interface) -> str | None:
    """Why documents cannot share its rows, if they cannot."""
    if interface.positions is None:
        return "takes no positions by which documents could be told apart"
    config: Any = backbone.config
    # Up to transformers 5.22 chunks are counted from the beginning of a row; a few tokens do not show it.
    if getattr(config.get_text_config(decoder=True), "attention_chunk_size", None):
        return "attends by chunks of a row, wherever documents begin"
    documents = torch.tensor(LAYOUT)
    if not has_values(embedding_of(backbone)):
        return None
    ids = plain_ids(backbone, *documents.shape)
    documents, here = documents.to(ids.device), torch.ones_like(ids)
    exact = all(p.dtype in (torch.float32, torch.float64) for p in backbone.parameters()) and not is_quantized(backbone)
    with trial(backbone):
        try:
            packed = interface.call(backbone, ids, positions=places(documents))[0].float()
        except Exception as error:  # of any kind: what the family says to positions without a mask
            return f"fails where documents share a row: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        mixed = interface.call(backbone, ids, here)[0].float()
        alone = torch.zeros_like(packed)
        for mine in (documents == number for number in range(int(documents.max()) + 1)):
            alone[mine] = interface.call(backbone, ids[mine][None], here[mine][None])[0][0].float()
    off, far = ((found - alone).norm(dim=-1)[documents >= 0].max() for found in (packed, mixed))
    if not far > FINE * alone.norm(dim=-1).max():
        return "gives logits that hardly depend on earlier tokens, so it cannot be tried"
    return None if off <= (FINE if exact else COARSE) * far else "lets documents that share a row see each other"
