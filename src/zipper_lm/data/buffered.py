"""Documents of rows that are encoded while training goes on: data sets that need not fit into memory, nor end.

Rows are gone through again and again, in buffers of so many as they come, each shuffled by itself. So which document
has which number depends on the seed and the buffer's size alone, and to go on anywhere takes a number and a place in
the stream: the buffer at hand is read again, and what was seen of it is passed over. Nothing is lost or repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np
from torch.utils.data import Dataset

from zipper_lm.data.broken import Broken
from zipper_lm.data.document import Document
from zipper_lm.data.encoding import Item, encoded, where_of
from zipper_lm.data.mixture import read_weights
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.data.sources.readers import Stream
from zipper_lm.data.tasks import build_document
from zipper_lm.data.token_ids import TokenIds


class Place(TypedDict):
    """Where a buffer of a stream begins; plain values.

    Keys:
        first: number of its first document. epoch: how often the stream had ended. row: rows before it in this epoch.
        state: of the stream, as `Stream.run` takes it; `None` is its beginning.
    """

    first: int
    epoch: int
    row: int
    state: Any


_BEGIN = Place(first=0, epoch=0, row=0, state=None)


class Placed(Document):
    """A document that knows the place that one can go on from."""

    def __init__(self, document: Document, place: Place) -> None:
        super().__init__(document)
        self.place = place


class _Found(NamedTuple):
    """A raw row: which it is in which epoch, where it is written, and the place of its buffer, if it has one."""

    epoch: int
    number: int
    where: str
    row: Any
    place: Place | None


class _Buffers(Protocol):
    def find(self, number: int) -> _Found:
        """The row of a document."""

    def go_on(self, place: Place) -> None:
        """What is asked for next is not before this place."""


class BufferedDocuments(Dataset[Document]):
    """Documents of several tasks, one a row; which task a row serves is drawn anew each time that it comes.

    Args:
        rows: raw ones; those of a `Stream` are read in order, by each process and worker for itself, others when they
            are asked for. weights: task template to weight. processor: has the codecs.
        modalities: of a row that is no document, to encode. seed: of order and tasks. buffer: rows that are shuffled
            together. count: documents of the whole training.
        limits: how many tokens, BOS and EOS included, the segments of some modalities may have together, and whose
            limit that is.

    Raises:
        ValueError: as `read_weights`; for a buffer or a count below 1; when a document is asked for, as `encoded`, if
            it exceeds a limit, or if the stream has no rows.
    """

    def __init__(
        self,
        rows: Sequence[Any] | Stream,
        weights: Mapping[str, float],
        processor: ZipperProcessor,
        modalities: Sequence[str],
        *,
        seed: int,
        buffer: int,
        count: int,
        limits: Sequence[tuple[Sequence[str], int, str]] = (),
    ) -> None:
        for name, value in (("buffer", buffer), ("count", count)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.tasks, self._probabilities = read_weights(weights, list(processor.specials), [{}] if weights else ())
        self.processor, self.modalities, self.seed, self.count = processor, modalities, seed, count
        self.limits = limits
        self._buffers: _Buffers
        if isinstance(rows, Stream):
            self._buffers = _OfStream(rows, buffer, seed)
        else:
            self._buffers = _OfSequence(rows, buffer, seed)

    def __len__(self) -> int:
        return self.count

    def go_on(self, place: Place) -> None:
        """No document before this place is asked for any more."""
        self._buffers.go_on(place)

    def __getitem__(self, number: int) -> Document:
        found = self._buffers.find(range(self.count)[number])
        _, row = next(iter(encoded(self.processor, [Item(found.where, found.row)], self.modalities, Broken())))
        document = row if isinstance(row, Document) else build_document(self._task(found), row)
        for segment in document:
            segment.ids = TokenIds(segment.ids or [])
        self._check(document, found.where)
        return document if found.place is None else Placed(document, found.place)

    def _task(self, found: _Found) -> Any:
        if not self.tasks:
            raise ValueError(f"tasks: {found.where} is no whole document, and there are no tasks to make one")
        draw = np.random.default_rng((self.seed, found.epoch, found.number))
        shares = self._probabilities.cumsum()
        return self.tasks[int((shares / shares[-1]).searchsorted(draw.random(), side="right"))]

    def _check(self, document: Document, where: str) -> None:
        for modalities, limit, whose in self.limits:
            if (tokens := sum(len(s.ids or []) + 2 for s in document if s.modality in modalities)) > limit:
                raise ValueError(f"data {where}: a stream of {tokens} tokens, and {whose} has {limit} positions")


def _shuffled(seed: int, epoch: int, first: int, size: int) -> np.ndarray:
    """The order of a buffer that begins with a row of an epoch, int64 [size]."""
    return np.random.default_rng((seed, epoch, first, 2)).permutation(size)


class _OfSequence:
    """Any row can be had at once: nothing is held."""

    def __init__(self, rows: Sequence[Any], buffer: int, seed: int) -> None:
        self._rows, self._buffer, self._seed = rows, buffer, seed
        self._at, self._order = (-1, -1), np.zeros(0, np.int64)

    def find(self, number: int) -> _Found:
        epoch, inside = divmod(number, len(self._rows))
        first = inside // self._buffer * self._buffer
        if self._at != (epoch, first):
            size = min(self._buffer, len(self._rows) - first)
            self._at, self._order = (epoch, first), _shuffled(self._seed, epoch, first, size)
        row = first + int(self._order[inside - first])
        return _Found(epoch, row, where_of(self._rows, row), self._rows[row], None)

    def go_on(self, place: Place) -> None:
        """It can begin anywhere."""


class _OfStream:
    """One buffer is held."""

    def __init__(self, stream: Stream, buffer: int, seed: int) -> None:
        self._stream, self._buffer, self._seed = stream, buffer, seed
        self._begin = _BEGIN
        self._restart()

    def go_on(self, place: Place) -> None:
        self._begin = place
        self._restart()

    def _restart(self) -> None:
        self._at, self._held, self._order = self._begin, list[Any](), np.zeros(0, np.int64)
        self._run: Any = None

    def find(self, number: int) -> _Found:
        if number < self._at["first"]:
            if number < self._begin["first"]:
                self._begin = _BEGIN
            self._restart()
        while number >= self._at["first"] + len(self._held):
            self._next()
        row = int(self._order[number - self._at["first"]])
        place, which = self._at, self._at["row"] + row
        return _Found(place["epoch"], which, f"row {which}", self._held[row], place)

    def _next(self) -> None:
        """Hold the buffer behind the one at hand."""
        if self._run is None:
            self._run = self._stream.run(self._at["state"], self._at["row"])
            place = self._at
        else:
            row = self._at["row"] + len(self._held)
            first = self._at["first"] + len(self._held)
            place = Place(first=first, epoch=self._at["epoch"], row=row, state=self._run.state())
        held = list(islice(self._run, self._buffer))
        if not held:
            if place["row"] == 0:
                raise ValueError("data: the stream has no rows")
            place = Place(first=place["first"], epoch=place["epoch"] + 1, row=0, state=None)
            self._run = self._stream.run(None, 0)
            if not (held := list(islice(self._run, self._buffer))):
                raise ValueError("data: the stream had rows, and has none any more")
        self._at, self._held = place, held
        self._order = _shuffled(self._seed, place["epoch"], place["row"], len(held))
