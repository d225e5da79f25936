"""One vocabulary for several modalities, and one stream for a document: how a single decoder sees what towers see.

The base modality keeps its ids; every other modality's ids follow behind them, special ids included. A document is its
segments in reading order, each as BOS ids EOS of its own modality, so that BOS says which modality comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zipper_lm.data.collation import ABSENT, IGNORED, Batch, Specials, tokens_of
from zipper_lm.data.document import Document

_LATE = 2**62  # sorts behind every segment
_NEXT = 2**31  # segments of a document have lower numbers


@dataclass(frozen=True)
class Modality:
    """A modality's place in the vocabulary.

    Args:
        name: of the modality. offset: its first id. size: how many it has.
        bos, eos, pad: its special ids, counted from 0 within the modality.
    """

    name: str
    offset: int
    size: int
    bos: int
    eos: int
    pad: int

    @property
    def specials(self) -> Specials:
        """Within the modality, as `collate` wants them."""
        return Specials(self.bos, self.eos, self.pad)


@dataclass(frozen=True)
class Joined:
    """A batch as one stream, right-padded.

    Attributes:
        input_ids, attention_mask, labels: int64 ``[batch, time]`` in the joint vocabulary.
        owners: int64 ``[batch, time]``, index of the token's modality; padding has `ABSENT`.
        documents: where documents share rows, int64 ``[batch, time]``: the token's, `ABSENT` for padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    owners: Tensor
    documents: Tensor | None = None


def join(batch: Batch, modalities: Sequence[Modality]) -> Joined:
    """The towers' streams of a batch (`zipper_lm.data.collation.collate`) in reading order.

    Args:
        batch: every id within its modality. modalities: of the vocabulary, in its order.
    """
    ids, labels, segments, owners = [], [], [], []
    for index, modality in enumerate(modalities):
        if modality.name not in batch:
            continue
        stream = batch[modality.name]
        here = stream["segments"]
        ids.append(stream["input_ids"] + modality.offset)
        target = stream["labels"] != IGNORED
        labels.append(torch.where(target, stream["labels"] + modality.offset, stream["labels"]))
        place = here + _NEXT * stream["documents"] if "documents" in stream else here
        segments.append(torch.where(here == ABSENT, _LATE, place))
        owners.append(torch.where(here == ABSENT, ABSENT, index))
    number = torch.cat(segments, 1)
    order = number.argsort(stable=True, dim=1)
    mask = (number.gather(1, order) < _LATE).long()
    width = int(mask.sum(1).max())
    ids_, labels_, owners_ = (torch.cat(rows, 1).gather(1, order)[:, :width] for rows in (ids, labels, owners))
    documents = None
    if any("documents" in stream for stream in batch.values()):
        documents = torch.where(mask > 0, number.gather(1, order) // _NEXT, ABSENT)[:, :width]
    return Joined(ids_, mask[:, :width], labels_, owners_, documents)


def prompts(documents: Sequence[Document], speaker: str, modalities: Sequence[Modality]) -> tuple[Tensor, Tensor]:
    """What the decoder has read when a segment of `speaker` begins, left-padded.

    Args:
        documents: encoded. speaker: who writes next.

    Returns:
        ids and mask, int64 ``[batch, time]``; the last token of each row is the speaker's BOS.
    """
    by_name = {m.name: m for m in modalities}
    rows = []
    for document in documents:
        row: list[int] = []
        for segment in document:
            own = by_name[segment.modality]
            row += [own.offset + i for i in tokens_of(segment, own.specials)]
        rows.append([*row, by_name[speaker].offset + by_name[speaker].bos])
    width = max(map(len, rows))
    filler = by_name[speaker].offset + by_name[speaker].pad
    ids = torch.tensor([[filler] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
