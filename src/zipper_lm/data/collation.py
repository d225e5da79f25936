"""Documents to batches: one stream of tokens per tower, and where each token stands in its document.

A tower sees its own segments as one contiguous stream, each segment as BOS ids EOS. The document's order only decides
what is visible across towers: a token sees the tokens of other towers' segments that come earlier in the document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zipper_lm.data.document import Document, Segment, check_modalities

IGNORED = -100
"""Label of a token that no loss counts (torch's default ignore_index)."""

ABSENT = -1
"""Segment number of padding: invisible to everyone."""

TowerBatch = dict[str, Tensor]
"""One tower's side of a batch. All ``[batch, time]`` int64, but `involved`, bool ``[batch, towers]``:

- ``input_ids``, ``attention_mask``: as in transformers.
- ``segments``: number of the token's segment in its document, `ABSENT` for padding.
- ``positions``: the token's place in its segment, BOS at 0.
- ``labels``: the token itself (or the segment's own label for it) where it is a target, else `IGNORED`.
- ``handover``: at each segment's EOS the index of the modality that speaks next, the number of towers for "done";
  else `IGNORED`.
- ``involved``: which towers take part in the row's document at all; a tower that does so alone is left alone.
"""


class Batch(dict[str, TowerBatch]):
    """A tower's side by the tower's name. A tower that no document of the batch involves is not in it."""

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Batch:
        """The batch on a device.

        Args:
            device: as `torch.Tensor.to` takes it. non_blocking: as there.
        """
        sides = {name: {k: v.to(device, non_blocking=non_blocking) for k, v in self[name].items()} for name in self}
        return Batch(sides)

    def numel(self) -> int:
        """Number of tokens in all streams, padding included: transformers' Trainer estimates its work by it."""
        return sum(side["input_ids"].numel() for side in self.values())


class Specials(NamedTuple):
    """A tower's special ids."""

    bos: int
    eos: int
    pad: int


def longest_stream(document: Document) -> int:
    """Tokens of the longest stream that `collate` makes of a document."""
    lengths: Counter[str] = Counter()
    for segment in document:
        lengths[segment.modality] += len(segment.ids or []) + 2  # BOS and EOS
    return max(lengths.values())


def tokens_of(segment: Segment, specials: Specials, *, open: bool = False) -> list[int]:
    """A segment as its tower reads it: BOS ids EOS, or BOS ids while it is still being written.

    Raises:
        ValueError: if the segment has not been encoded.
    """
    if segment.ids is None:
        raise ValueError(f"segment of modality {segment.modality!r} has no ids: encode the document first")
    return [specials.bos, *segment.ids] + ([] if open else [specials.eos])


def collate(
    documents: Sequence[Document],
    specials: Mapping[str, Specials],
    *,
    side: Literal["left", "right"] = "right",
    involved: Sequence[Collection[str]] | None = None,
    towers: Sequence[str] | None = None,
    open_last: bool = False,
) -> Batch:
    """Encoded documents to a batch.

    Args:
        documents: every segment with ids.
        specials: each tower's special ids; its order is the order of `handover` indices.
        side: where padding goes.
        involved: per document, the towers that take part; `None` means: those it has segments of.
        towers: the towers to make a stream for; `None` means all that some document involves.
        open_last: the last segment of each document is still being written: no EOS.

    Raises:
        ValueError: for an unknown modality, a segment without ids, or no documents.
    """
    if not documents:
        raise ValueError("collate: no documents")
    check_modalities(documents, list(specials))
    if side not in ("left", "right"):
        raise ValueError(f"collate: side must be 'left' or 'right', got {side!r}")
    if unknown := sorted(set(towers or ()) - set(specials)):
        raise ValueError(f"collate: towers names {unknown}, there are {list(specials)}")
    if involved is not None and len(involved) != len(documents):
        raise ValueError(f"collate: involved has {len(involved)} rows, there are {len(documents)} documents")
    names = list(specials)
    if involved is None:
        involved = [d.modalities for d in documents]
    chosen = [n for n in names if any(n in d.modalities for d in documents)] if towers is None else list(towers)
    flags = involvement(involved, names)
    return Batch({n: {**_stream(documents, n, specials, names, side, open_last), "involved": flags} for n in chosen})


def involvement(involved: Sequence[Collection[str]], names: Sequence[str]) -> Tensor:
    """Which of the towers `names` take part in each row, bool ``[batch, towers]``."""
    return torch.tensor([[name in row for name in names] for row in involved], dtype=torch.bool)


def _stream(
    documents: Sequence[Document],
    name: str,
    specials: Mapping[str, Specials],
    names: list[str],
    side: str,
    open_last: bool,
) -> TowerBatch:
    """One tower's side of the batch, without `involved`."""
    rows: list[dict[str, list[int]]] = []
    for document in documents:
        row: dict[str, list[int]] = {k: [] for k in ("input_ids", "segments", "positions", "labels", "handover")}
        for number, segment in enumerate(document):
            if segment.modality != name:
                continue
            last = number + 1 == len(document)
            ids = tokens_of(segment, specials[name], open=open_last and last)
            row["input_ids"] += ids
            row["segments"] += [number] * len(ids)
            row["positions"] += range(len(ids))
            labels = ids[1:] if segment.labels is None else [*segment.labels, *ids[1 + len(segment.labels) :]]
            row["labels"] += [IGNORED, *labels] if segment.target else [IGNORED] * len(ids)
            row["handover"] += [IGNORED] * (len(ids) - 1)
            row["handover"] += [
                IGNORED if open_last and last else len(names) if last else names.index(document[number + 1].modality)
            ]
        rows.append(row)
    width = max(1, *(len(row["input_ids"]) for row in rows))
    fill = {"input_ids": specials[name].pad, "segments": ABSENT, "positions": 0, "labels": IGNORED, "handover": IGNORED}
    batch: dict[str, list[list[int]]] = {k: [] for k in (*fill, "attention_mask")}
    for row in rows:
        # An absent row attends to one of its padding tokens: attention over nothing at all is not a number.
        mask = [1] * max(1, len(row["input_ids"]))
        for key, value in (*fill.items(), ("attention_mask", 0)):
            tokens = mask if key == "attention_mask" else row[key]
            padding = [value] * (width - len(tokens))
            batch[key].append(padding + tokens if side == "left" else tokens + padding)
    return {k: torch.tensor(v, dtype=torch.long) for k, v in batch.items()}
