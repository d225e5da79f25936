"""Rows to encoded rows: every value through its codec once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from zipper_lm.codecs.audio import read_sound
from zipper_lm.codecs.codec import Codec
from zipper_lm.codecs.picture import is_picture, read_picture
from zipper_lm.codecs.suffixes import is_media
from zipper_lm.data.broken import Broken
from zipper_lm.data.document import Document
from zipper_lm.data.prepared import PreparedRows
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.data.sources.readers import Rows
from zipper_lm.data.sources.table import missing_file, readable
from zipper_lm.data.token_ids import TokenIds
from zipper_lm.utils.processes import main_console, shared
from zipper_lm.utils.progress import bar

T = TypeVar("T")
CHUNK = 64


class Joined(Sequence[Any]):
    """Sequences of rows, one after the other; rows are read when they are asked for."""

    def __init__(self, *parts: Sequence[Any]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[n] for n in range(len(self))[index]]
        part, number = self.find(range(len(self))[index])
        return part[number]

    def find(self, number: int) -> tuple[Sequence[Any], int]:
        """The part that a row is in, and its number there."""
        part = int(np.searchsorted(self._ends, number, side="right"))
        return self.parts[part], number - (int(self._ends[part - 1]) if part else 0)


class Item(NamedTuple):
    """A raw row or document, and where it is from."""

    where: str
    row: Any


def items(rows: Iterable[Any], broken: Broken, numbers: Iterable[int] | None = None) -> Iterator[Item]:
    """Rows with their places; those that cannot even be read go to `broken`.

    Args:
        rows: from `training_rows`. broken: what it is. numbers: of a sequence's rows, only these.
    """
    if not isinstance(rows, Sequence):
        yield from (Item(f"row {n}", row) for n, row in enumerate(rows))
        return
    for number in range(len(rows)) if numbers is None else numbers:
        where = where_of(rows, number)
        try:
            row = rows[number]
        except ValueError as error:
            broken.add(where, error)
        else:
            yield Item(where, row)


def where_of(rows: Sequence[Any], number: int) -> str:
    """Where a row is from."""
    if isinstance(rows, Joined):
        part, inside = rows.find(number)
        return where_of(part, inside) if isinstance(part, Rows) else f"clip {inside}"
    return rows.where(number) if isinstance(rows, Rows) else f"row {number}"


def encoded(
    processor: ZipperProcessor, found: Iterable[Item], modalities: Sequence[str], broken: Broken
) -> Iterator[tuple[Item, Any]]:
    """Each item with its row encoded: a dict of `Segment`s with ids (text keeps its value too), or a document with ids.

    Args:
        processor: the codecs. found: what to encode. modalities: of a row that is no document. broken: takes items that
            lack a modality or that a codec cannot read.

    Raises:
        ValueError: where `broken` does.
    """
    for chunk in _chunks(found):
        ready = []
        for item in chunk:
            try:
                ready.append((item, _as_document(item.row, modalities)))
            except ValueError as error:
                broken.add(item.where, error)
        for item, document in _coded(processor, ready, broken):
            for segment in document:
                if not isinstance(segment.value, str) or segment.modality != "text":
                    segment.value = None
            yield item, document if isinstance(item.row, Document) else dict(zip(modalities, document))


def _chunks(found: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(found)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _coded(
    processor: ZipperProcessor, ready: Sequence[tuple[Item, Document]], broken: Broken
) -> Iterator[tuple[Item, Document]]:
    try:
        coded = processor.encode([document for _, document in ready])
    except ValueError:  # which of them it is, is found one by one
        for item, document in ready:
            try:
                yield item, processor.encode([document])[0]
            except ValueError as error:
                broken.add(item.where, error)
    else:
        yield from zip((item for item, _ in ready), coded)


def encode_rows(
    processor: ZipperProcessor, rows: Iterable[Any], modalities: Sequence[str], broken: Broken | None = None
) -> Sequence[Any]:
    """Rows whose values are `Segment`s with ids (text keeps its value too), documents with ids. What is prepared is
    encoded already; of everything else only the ids are kept. Several processes share the work.

    Args:
        processor: the codecs. rows: from `training_rows`. modalities: to encode, of rows that are no documents. broken:
            takes what cannot be read; `None`: that is an error.

    Raises:
        ValueError: on a row without one of the modalities, or a value that its codec cannot read, if `broken` has no
            room for it; the message says which row.
    """
    if isinstance(rows, PreparedRows) or (isinstance(rows, Joined) and isinstance(rows.parts[0], PreparedRows)):
        return rows

    def encode(piece: Any, left_out: Broken) -> list[Any]:
        found = items(rows, left_out, piece) if isinstance(piece, range) else piece
        done = [row for _, row in encoded(processor, found, modalities, left_out)]
        for row in done:
            for segment in row if isinstance(row, Document) else row.values():
                segment.ids = TokenIds(segment.ids or [])
        return done

    pieces = _ranges(len(rows)) if isinstance(rows, Sequence) else _chunks(items(rows, Broken()))
    return _shared(pieces, encode, broken or Broken(), len(rows) if isinstance(rows, Sized) else None)


def _ranges(count: int) -> Iterator[range]:
    return (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _shared(
    pieces: Iterable[T], encode: Callable[[T, Broken], list[Any]], broken: Broken, total: int | None
) -> list[Any]:
    """What all pieces hold, encoded by all processes together, with a bar on standard error: standard output is for
    results.

    Args:
        pieces: the same in all processes. encode: one of them, and what of it cannot be read into the second argument.
        broken: takes that, in order. total: how many rows there are.
    """

    def work(piece: T) -> tuple[list[Any], list[dict[str, str]]]:
        left_out = Broken(sys.maxsize)  # whether they are too many is known where all are
        return encode(piece, left_out), left_out.items

    done: list[Any] = []
    count = 0
    with bar(main_console(), "encoding", transient=True) as advance:
        advance(0, total)
        for found, left_out in shared(pieces, work):
            done += found
            broken.extend(left_out)
            count += sum(each is not None for each in found) + len(left_out)
            advance(count, total)
    return done


def encoded_modalities(rows: Iterable[Any], named: set[str], towers: Sequence[str]) -> list[str]:
    """What of each row is encoded: all modalities that tasks name, and text, which scores are compared with."""
    first: Any = next((row for row in readable(rows) if not isinstance(row, Document)), {})
    return sorted(named | ({"text"} & set(towers) & set(first)))


def _as_document(row: Any, modalities: Sequence[str]) -> Document:
    if isinstance(row, Document):
        return row
    if missing := [m for m in modalities if row.get(m) is None]:
        raise ValueError(f"no {missing}; it has {sorted(row)}; name columns in data.columns")
    return Document([(m, row[m]) for m in modalities])


def column(rows: Iterable[Any], modality: str, broken: Broken | None = None) -> list[Any]:
    """All raw values of one modality, from rows and from whole documents.

    Args:
        rows: from `training_rows`. modality: which. broken: takes values that cannot be read; each is tried only if
            that has room for any, since reading all sounds takes its time.

    Raises:
        ValueError: if there is none, or `broken` is full.
    """
    return column_with(rows, modality, None, broken)[0]


def _numbered(rows: Iterable[Any], broken: Broken) -> Iterator[tuple[int, Item]]:
    """As `items`, each with its number among all rows, those that cannot be read counted."""
    if not isinstance(rows, Sequence):
        return enumerate(items(rows, broken))
    return ((number, item) for number in range(len(rows)) for item in items(rows, broken, [number]))


def column_with(
    rows: Iterable[Any], modality: str, other: str | None, broken: Broken | None = None, limit: int | None = None
) -> tuple[list[Any], list[Any]]:
    """As `column`, and for each value what its row has of another modality, `None` where it has none.

    Args:
        rows, modality, broken: as of `column`. other: the other modality; of a whole document it is not known which
            belongs to which. limit: of how many rows, the first, it is told; `None` is all.
    """
    broken = broken or Broken()
    values: list[Any] = []
    others: list[Any] = []
    first: Any = None
    for number, (where, row) in _numbered(rows, broken):
        first = row if first is None else first
        told = other is not None and not isinstance(row, Document) and (limit is None or number < limit)
        if isinstance(row, Document):
            found = [s.value for s in row if s.modality == modality and s.value is not None]
        else:
            found = [row[modality]] if row.get(modality) is not None else []
        try:
            for value in found if modality != "text" else ():
                for problem in missing_file(value, where):
                    raise ValueError(f"data: {problem}")
            for value in found if broken.limit and modality != "text" else ():
                if not isinstance(value, str | list | tuple) or is_media(value):  # others are symbols of some sequence
                    read_picture(value) if is_picture(value) else read_sound(value)
            values += found
            others += [row.get(other) if told else None] * len(found)
        except ValueError as error:
            broken.add(where, error)
    if not values:
        has = first.modalities if isinstance(first, Document) else sorted(first or {})
        raise ValueError(f"data: no row has {modality!r}; they have {has}; name the column in data.columns")
    return values, others


def encode_column(codec: Codec, values: Sequence[Any], broken: Broken | None = None) -> list[list[int]]:
    """One modality's values to ids, in chunks, with a progress bar. Several processes share the work.

    Raises:
        ValueError: on a value that the codec cannot read, if `broken` has no room for it; the message says which row.
    """
    return [ids for ids in encode_each(codec, values, broken) if ids is not None]


def encode_each(codec: Codec, values: Sequence[Any], broken: Broken | None = None) -> list[list[int] | None]:
    """As `encode_column`, with `None` in the place of a value that cannot be read."""

    def encode(piece: range, left_out: Broken) -> list[list[int] | None]:
        try:
            return list(codec.encode([values[number] for number in piece]))
        except ValueError:  # which of them it is, is found one by one
            ids: list[list[int] | None] = []
            for number in piece:
                try:
                    ids += codec.encode([values[number]])
                except ValueError as error:
                    left_out.add(f"row {number}", error)
                    ids.append(None)
            return ids

    return _shared(_ranges(len(values)), encode, broken or Broken(), len(values))


def token_counts(rows: Sequence[Any]) -> Iterator[dict[str, tuple[int, int]]]:
    """Of each encoded row or document, by modality: tokens without BOS and EOS, and segments."""
    if isinstance(rows, Joined):
        for part in rows.parts:
            yield from token_counts(part)
    elif isinstance(rows, PreparedRows):
        stored = rows.counts()
        for each in zip(*(zip(*found) for found in stored.values())):
            yield {m: (int(tokens), int(parts)) for m, (tokens, parts) in zip(stored, each) if parts}
    else:
        for row in rows:
            counts: dict[str, tuple[int, int]] = {}
            for segment in row if isinstance(row, Document) else row.values():
                tokens, parts = counts.get(segment.modality, (0, 0))
                counts[segment.modality] = tokens + len(segment.ids or []), parts + 1
            yield counts


def stream_lengths(rows: Sequence[Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of encoded rows and documents, without reading the ids of what is prepared: by modality, tokens with BOS and EOS
    of each segment, int64 [rows], 0 where there is none; and whether each is a whole document, bool [rows]."""
    if isinstance(rows, Joined):
        parts = [stream_lengths(part) for part in rows.parts]
        names = {name: None for found, _ in parts for name in found}
        whole = [each for _, each in parts]
        nothing = [np.zeros(len(each), np.int64) for each in whole]
        joined = {n: np.concatenate([f.get(n, none) for (f, _), none in zip(parts, nothing)]) for n in names}
        return joined, np.concatenate(whole)
    if isinstance(rows, PreparedRows):
        counts = rows.counts()
        return {m: tokens + 2 * segments for m, (tokens, segments) in counts.items()}, np.full(len(rows), rows.whole)
    lengths: dict[str, np.ndarray] = {}
    whole_rows = np.zeros(len(rows), bool)
    for number, row in enumerate(rows):
        whole_rows[number] = isinstance(row, Document)
        for segment in row if isinstance(row, Document) else row.values():
            stream = lengths.setdefault(segment.modality, np.zeros(len(rows), np.int64))
            stream[number] += len(segment.ids or []) + 2
    return lengths, whole_rows


def is_document(rows: Sequence[Any], number: int) -> bool:
    """Whether a row is a whole document; what is prepared is not read."""
    if isinstance(rows, Joined):
        return is_document(*rows.find(number))
    return rows.whole if isinstance(rows, PreparedRows) else isinstance(rows[number], Document)
