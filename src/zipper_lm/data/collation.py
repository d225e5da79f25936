"""Documents to batches: one stream of tokens per tower, and where each token stands in its document.

A tower sees its own segments as one contiguous stream, each segment as BOS ids EOS. The document's order only decides
what is visible across towers: a token sees the tokens of other towers' segments that come earlier in the document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zipper_lm.data.document import Document, Segment, check_modalities
from zipper_lm.data.packing import best_fit, sight
from zipper_lm.utils.host import on_host, send

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
- ``involved``: which towers take part in the row's documents at all; a tower that does so alone is left alone.
- ``documents``: only where several documents may share a row: the number of the token's document among those that were
  given, `ABSENT` for padding.
- ``known``: in training, states of a frozen tower that were kept (`zipper_lm.fusion.prefix`), where all rows have them:
  floating-point ``[batch, time, kept, hidden]``, zero at padding.
"""


class Batch(dict[str, TowerBatch]):
    """A tower's side by the tower's name. A tower that no document of the batch involves is not in it."""

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Batch:
        """The batch on a device, which need not be asked what is in it: see `on_host`.

        Args:
            device: as `torch.Tensor.to` takes it. non_blocking: as there; a GPU is not waited for in any case.
        """
        flat = [tensor for side in self.values() for tensor in side.values()]
        sent = iter(send(flat, device, non_blocking=non_blocking))
        return Batch({name: {key: next(sent) for key in side} for name, side in self.items()})

    def numel(self) -> int:
        """Number of tokens in all streams, padding included: transformers' Trainer estimates its work by it."""
        return sum(side["input_ids"].numel() for side in self.values())


def batch_on_host(batch: Mapping[str, TowerBatch]) -> Batch:
    """A batch on the CPU, where looking at it costs nothing. One that `Batch.to` sent need not be fetched."""
    return Batch({name: {key: on_host(tensor) for key, tensor in side.items()} for name, side in batch.items()})


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
    return [specials.bos, *_known(segment)] + ([] if open else [specials.eos])


def _known(segment: Segment) -> Sequence[int]:
    """A segment's ids. Raises `ValueError` if it has not been encoded."""
    if segment.ids is None:
        raise ValueError(f"segment of modality {segment.modality!r} has no ids: encode the document first")
    return segment.ids


def collate(
    documents: Sequence[Document],
    specials: Mapping[str, Specials],
    *,
    side: Literal["left", "right"] = "right",
    involved: Sequence[Collection[str]] | None = None,
    towers: Sequence[str] | None = None,
    open_last: bool = False,
    packing: bool = False,
) -> Batch:
    """Encoded documents to a batch.

    Args:
        documents: every segment with ids.
        specials: each tower's special ids; its order is the order of `handover` indices.
        side: where padding goes.
        involved: per document, the towers that take part; `None` means: those it has segments of.
        towers: the towers to make a stream for; `None` means all that some document involves.
        open_last: the last segment of each document is still being written: no EOS.
        packing: let documents share rows, in which each is as in a row of its own: those of the same `sight` that
            involve the same towers, so far as no stream becomes longer than the longest of a document.

    Raises:
        ValueError: for an unknown modality, a segment without ids, no documents, or `packing` of what is being written.
    """
    if not documents:
        raise ValueError("collate: no documents")
    check_modalities(documents, list(specials))
    if side not in ("left", "right"):
        raise ValueError(f"collate: side must be 'left' or 'right', got {side!r}")
    if unknown := sorted(set(towers or ()) - set(specials)):
        raise ValueError(f"collate: towers names {unknown}, there are {list(specials)}")
    if packing and open_last:
        raise ValueError("collate: packing is for finished documents, and open_last goes on with each of them")
    if involved is not None and len(involved) != len(documents):
        raise ValueError(f"collate: involved has {len(involved)} rows, there are {len(documents)} documents")
    names = list(specials)
    if involved is None:
        involved = [d.modalities for d in documents]
    chosen = [n for n in names if any(n in d.modalities for d in documents)] if towers is None else list(towers)
    pieces = {n: [_pieces(document, n, names, open_last) for document in documents] for n in chosen}
    rows = [[number] for number in range(len(documents))]
    if packing:
        lengths = [[sum(piece.length for piece in found[number]) for found in pieces.values()] for (number,) in rows]
        rows = best_fit(np.array(lengths), [(frozenset(i), sight(d)) for i, d in zip(involved, documents)])
    flags = involvement([involved[row[0]] for row in rows], names)
    streams = {n: _stream(found, rows, specials[n], side) for n, found in pieces.items()}
    for stream in streams.values() if not packing else ():
        del stream["documents"]
    return Batch({n: {**stream, "involved": flags} for n, stream in streams.items()})


def with_every_tower(batch: Batch, specials: Mapping[str, Specials]) -> Batch:
    """A batch with a side for every tower, in the order of `specials`: one that no document involves has a token of
    padding in each row, as in `collate(..., towers=...)`."""
    known = batch_on_host(batch)
    first = next(iter(known.values()))
    numbers = [[number] for number in range(len(first["involved"]))]
    made = {}
    for name, special in specials.items():
        if name not in batch:
            stream = _stream([[] for _ in numbers], numbers, special, "right") | {"involved": first["involved"]}
            made[name] = {key: tensor for key, tensor in stream.items() if key != "documents" or key in first}
    return Batch({name: batch[name] if name in batch else made[name] for name in specials})


def involvement(involved: Sequence[Collection[str]], names: Sequence[str]) -> Tensor:
    """Which of the towers `names` take part in each row, bool ``[batch, towers]``."""
    return torch.tensor([[name in row for name in names] for row in involved], dtype=torch.bool)


class _Piece(NamedTuple):
    """A segment as its tower reads it.

    Attributes:
        number: its place in the document. ids, labels: int ``[time]``, BOS and EOS left out; `None`: no target. end:
            whether EOS follows. speaker: who speaks next, as `TowerBatch` has it.
    """

    number: int
    ids: np.ndarray
    labels: np.ndarray | None
    end: bool
    speaker: int

    @property
    def length(self) -> int:
        """Tokens, BOS and EOS included."""
        return 1 + len(self.ids) + self.end


def _pieces(document: Document, name: str, names: list[str], open_last: bool) -> list[_Piece]:
    """What one tower reads of a document."""
    found = []
    for number, segment in enumerate(document):
        if segment.modality != name:
            continue
        last = number + 1 == len(document)
        end = not (open_last and last)
        speaker = len(names) if last else names.index(document[number + 1].modality)
        ids = np.asarray(_known(segment), np.int64)
        labels = (ids if segment.labels is None else np.asarray(segment.labels, np.int64)) if segment.target else None
        found.append(_Piece(number, ids, labels, end, speaker if end else IGNORED))
    return found


def _stream(
    pieces: Sequence[Sequence[_Piece]], rows: Sequence[Sequence[int]], specials: Specials, side: str
) -> TowerBatch:
    """One tower's side of the batch, without `involved`.

    Args:
        pieces: of each document. rows: the documents of each row. specials: the tower's. side: of padding.
    """
    bos, eos, pad = specials
    lengths = [sum(piece.length for number in row for piece in pieces[number]) for row in rows]
    shape = len(rows), max(1, *lengths)
    fill = {"input_ids": pad, "segments": ABSENT, "positions": 0, "labels": IGNORED, "handover": IGNORED}
    fill |= {"attention_mask": 0, "documents": ABSENT}
    made = {key: np.full(shape, value) for key, value in fill.items()}
    ids, labels = made["input_ids"], made["labels"]
    for row, (numbers, length) in enumerate(zip(rows, lengths)):
        # An absent row attends to one of its padding tokens: attention over nothing at all is not a number.
        present = max(1, length)
        made["attention_mask"][row, shape[1] - present if side == "left" else 0 :][:present] = 1
        start = shape[1] - length if side == "left" else 0
        for document, piece in ((number, piece) for number in numbers for piece in pieces[number]):
            end, content = start + piece.length, slice(start + 1, start + 1 + len(piece.ids))
            ids[row, start], ids[row, content] = bos, piece.ids
            if piece.end:
                ids[row, end - 1] = eos
                made["handover"][row, end - 1] = piece.speaker
            if piece.labels is not None:
                labels[row, content] = piece.labels
                labels[row, content.stop : end] = eos
            made["segments"][row, start:end] = piece.number
            made["documents"][row, start:end] = document
            made["positions"][row, start:end] = np.arange(piece.length)
            start = end
    return {key: torch.from_numpy(value) for key, value in made.items()}
