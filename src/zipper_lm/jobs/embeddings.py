"""Embeddings of a new tower that begin at what its codec's units stand for: like units are then alike from the start.

A table of random rows knows nothing of a codebook's geometry, and a few hours of sound are too little to learn it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from zipper_lm.codecs.codec import CODECS, Codec, own_codec, unit_vectors

SIZE = 0.5
"""Root mean square of the numbers: about that of a small decoder's residual stream after its first layers. Smaller
rows, such as those a decoder is made with (0.02), would be moved away by the first few dozen steps of Adam."""


def check_codebook(kind: str) -> None:
    """Raise `ValueError` if a codec of this kind, of this package, has units without vectors."""
    if kind in CODECS and not hasattr(own_codec(kind), "unit_vectors"):
        raise ValueError(_refusal(kind))


@torch.no_grad()
def begin_at_codebook(backbone: PreTrainedModel, codec: Codec) -> None:
    """Set the input embeddings of a codec's units to their vectors, those of its other ids stay as they are.

    They have the size `SIZE`; where the head is the same table they keep the size that the decoder was made with, as
    logits grow with it. Where vectors are wider than the embeddings, their first principal components are taken; where
    they are narrower, the rest of each embedding stays as it is.

    Raises:
        ValueError: if the codec's units have no vectors.
    """
    found = unit_vectors(codec)
    if found is None:
        raise ValueError(_refusal(codec.kind))
    ids, vectors = found
    embeddings: Any = backbone.get_input_embeddings()
    table = embeddings.weight
    centred = vectors.double() - vectors.double().mean(0)
    width = min(table.shape[1], centred.shape[1])
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    rows = centred @ directions[:width].T
    head: Any = backbone.get_output_embeddings()
    tied = head is not None and head.weight is table
    size = table[ids.start : ids.stop].square().mean().sqrt() if tied else SIZE
    rows *= size / rows.square().mean().sqrt().clamp_min(1e-12)
    table[ids.start : ids.stop, : rows.shape[1]] = rows.to(table)


def _refusal(kind: str) -> str:
    return f"embeddings='codebook': the ids of a codec of kind {kind!r} stand for no vectors; leave embeddings out"
