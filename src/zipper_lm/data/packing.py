"""Several documents in one row of a batch: which of them, and where each of their tokens stands.

A batch of N documents stays a batch of these N documents; only its layout in memory changes. What a token sees and
where it stands is as in a row of its own, so losses and gradients are those of a row for each document, but for the
order in which numbers are added.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from zipper_lm.data.document import Document


def best_fit(lengths: np.ndarray, kinds: Sequence[Hashable]) -> list[list[int]]:
    """Documents to rows, the longest first, each to the row that it leaves the least room in (best fit, decreasing).
    No row of any stream is longer than the longest stream of any document.

    Args:
        lengths: tokens of each document's streams, int ``[documents, streams]``. kinds: of each document; a row holds
            documents of one kind.

    Returns:
        The numbers of the documents of each row, in their order.
    """
    width = lengths.max()
    loads = np.zeros_like(lengths)  # at most as many rows as documents
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    own = np.array([numbers[kind] for kind in kinds])
    row_kinds = np.full(len(lengths), -1)
    rows: list[list[int]] = []
    for document in np.argsort(-lengths.max(1), kind="stable").tolist():
        fullest = (loads + lengths[document]).max(1)
        fits = (row_kinds == own[document]) & (fullest <= width)
        row = int(np.where(fits, fullest, -1).argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
        rows[row].append(document)
        loads[row] += lengths[document]
        row_kinds[row] = own[document]
    return [sorted(row) for row in rows]


def sight(document: Document) -> frozenset[tuple[str, str]]:
    """(reader, source) of the modalities of which some segment comes after one of another's. Documents that share a row
    have it in common: else zips would work on documents that have nothing for them."""
    names = document.modalities
    return frozenset((reader, source) for n, reader in enumerate(names) for source in names[:n] if source != reader)


def places(documents: Tensor) -> Tensor:
    """Each token's place in its document's part of a row, from 0, int64 ``[batch, time]``; 0 for padding.

    Args:
        documents: int64 ``[batch, time]``, the number of each token's document, below 0 for padding. The tokens of a
            document lie next to each other.
    """
    order = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return (order - torch.where(begins, order, 0).cummax(1).values).masked_fill(documents < 0, 0)
