"""Rows to encoded rows: every value through its codec once, before training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from zipper_lm.codecs.audio import read_audio
from zipper_lm.codecs.codec import Codec
from zipper_lm.codecs.picture import is_picture, read_picture
from zipper_lm.data.broken import Broken
from zipper_lm.data.clips import recombine
from zipper_lm.data.document import Document
from zipper_lm.data.prepared import TRAIN, VALIDATION, PreparedRows, is_prepared, open_prepared
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.data.sources.readers import Rows, Stream, read_rows, stream_rows
from zipper_lm.data.sources.table import missing_file, readable
from zipper_lm.jobs.recipes.schema import DataRecipe
from zipper_lm.utils.processes import main_console
from zipper_lm.utils.progress import barred

if TYPE_CHECKING:
    from zipper_lm.models.zipper import ZipperModel

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


Opened = Rows | Stream | PreparedRows
"""A split that is open: rows are read when they are asked for; those that were prepared are encoded."""


def training_rows(
    data: DataRecipe, seed: int = 0, opened: Opened | None = None, broken: Broken | None = None
) -> Sequence[Any] | Stream:
    """The training split as the recipe wants it: limited, drawn from, excluded from, and with recombined clips.

    Args:
        data: the recipe. seed: of what is drawn. opened: the split from `open_split`, if that is done.
        broken: where clips that cannot be read are listed; `None` allows none.

    Raises:
        ValueError: as `open_split` and `clip_rows`.
    """
    rows = open_split(data, TRAIN) if opened is None else opened
    if data.fraction < 1.0:
        assert not isinstance(rows, Stream)
        count = max(1, round(data.fraction * len(rows)))
        rows = rows.select(sorted(np.random.default_rng(seed).permutation(len(rows))[:count].tolist()))
    if data.clips is None:
        return rows
    assert not isinstance(rows, Stream)
    return Joined(rows, clip_rows(data, seed, broken))


def open_split(data: DataRecipe, split: str, *, check: bool = True) -> Opened:
    """A split as it is read, without what is excluded: of the training split no more than the recipe's limit.

    Args:
        data: the recipe. split: ``"train"`` or ``"validation"``; how the source calls it, the recipe says.
        check: whether a row that lacks a value or a file is an error at once, unless `data.broken_limit` allows some.

    Raises:
        ValueError: as `read_rows` and `open_prepared`; if nothing is left, or prepared data cannot follow a setting.
    """
    name = data.train if split == TRAIN else str(data.validation)
    limit = data.limit if split == TRAIN else data.validation_limit
    read = None if data.exclude else limit  # what is excluded does not count
    if is_prepared(data.source):
        prepared = open_prepared(data.source)
        _check_as_prepared(data, prepared.description["data"])
        rows: Any = prepared.rows(split)
        done = prepared.description["data"]["exclude"]
        exclude = {c: values for c, values in data.exclude.items() if not set(values) <= set(done.get(c, ()))}
    else:
        open_rows: Callable[..., Rows | Stream] = stream_rows if data.streaming else read_rows
        check = check and data.broken_limit == 0
        rows = open_rows(data.source, data.columns, name, read, revision=data.revision, check=check)
        exclude = data.exclude
    if exclude:
        rows = rows.without(exclude)
    rows = rows.first(limit) if isinstance(rows, Stream) else rows[:limit]
    if exclude and next(readable(rows), None) is None:
        raise ValueError(f"data: {data.source} has no rows left in split {name!r} after data.exclude")
    return rows


def _check_as_prepared(data: DataRecipe, before: Mapping[str, Any]) -> None:
    """Raise `ValueError` for settings that would have no effect, because the data was prepared with others. Names that
    are left at their default are as prepared."""
    plain = DataRecipe(source=data.source)
    for name in ("revision", "columns", "train", "validation"):
        value = getattr(data, name)
        if value is not None and value not in (getattr(plain, name), before[name]):
            raise _prepared_otherwise(data, name, value, before[name])
    if before["limit"] is not None and (data.limit is None or data.limit > before["limit"]):
        raise _prepared_otherwise(data, "limit", data.limit, before["limit"])
    if any(set(values) - set(data.exclude.get(column, ())) for column, values in before["exclude"].items()):
        raise _prepared_otherwise(data, "exclude", data.exclude, before["exclude"])


def _prepared_otherwise(data: DataRecipe, name: str, value: Any, before: Any) -> ValueError:
    return ValueError(
        f"data.{name} is {value!r}, but {data.source} was prepared with {before!r}; set it so, or prepare it anew"
    )


def clip_rows(data: DataRecipe, seed: int, broken: Broken | None = None) -> Sequence[Any]:
    """The recombined utterances that a recipe asks for.

    Args:
        data: the recipe. seed: of the draw. broken: where clips that cannot be read are listed; `None` allows none.

    Raises:
        ValueError: as `read_rows` and `recombine`, or if prepared data has others or none.
    """
    assert data.clips is not None
    if is_prepared(data.source):
        return open_prepared(data.source).clips(data.clips, seed, data.exclude)
    check = broken is None or broken.limit == 0
    clips = read_rows(data.clips.source, data.columns, check=check).without(data.exclude)
    return list(recombine(clips, data.clips.count, words=data.clips.words, seed=seed, broken=broken))


def validation_rows(data: DataRecipe, *, check: bool = True) -> Sequence[Any]:
    """The first rows of the validation split, without what is excluded; empty if the recipe has none.

    Args:
        data: the recipe. check: as of `open_split`.

    Raises:
        ValueError: as `training_rows`.
    """
    if data.validation is None:
        return []
    rows = open_split(data, VALIDATION, check=check)
    return list(islice(rows, data.validation_limit)) if isinstance(rows, Stream) else rows[: data.validation_limit]


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
    encoded already; of everything else only the ids are kept.

    Args:
        processor: the codecs. rows: from `training_rows`. modalities: to encode, of rows that are no documents. broken:
            takes what cannot be read; `None`: that is an error.

    Raises:
        ValueError: on a row without one of the modalities, or a value that its codec cannot read, if `broken` has no
            room for it; the message says which row.
    """
    if isinstance(rows, PreparedRows) or (isinstance(rows, Joined) and isinstance(rows.parts[0], PreparedRows)):
        return rows
    broken = broken or Broken()
    told = _told(items(rows, broken), "encoding", len(rows) if isinstance(rows, Sized) else None)
    return [row for _, row in encoded(processor, told, modalities, broken)]


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
    broken = broken or Broken()
    values: list[Any] = []
    first: Any = None
    for where, row in items(rows, broken):
        first = row if first is None else first
        if isinstance(row, Document):
            found = [s.value for s in row if s.modality == modality and s.value is not None]
        else:
            found = [row[modality]] if row.get(modality) is not None else []
        try:
            for value in found if modality != "text" else ():
                for problem in missing_file(value, where):
                    raise ValueError(f"data: {problem}")
            for value in found if broken.limit and modality != "text" else ():
                read_picture(value) if is_picture(value) else read_audio(value)
            values += found
        except ValueError as error:
            broken.add(where, error)
    if not values:
        has = first.modalities if isinstance(first, Document) else sorted(first or {})
        raise ValueError(f"data: no row has {modality!r}; they have {has}; name the column in data.columns")
    return values


def encode_column(codec: Codec, values: Sequence[Any], broken: Broken | None = None) -> list[list[int]]:
    """One modality's values to ids, in chunks, with a progress bar.

    Raises:
        ValueError: on a value that the codec cannot read, if `broken` has no room for it; the message says which row.
    """
    broken = broken or Broken()
    ids: list[list[int]] = []
    for chunk in _chunks(_told(enumerate(values), "encoding", len(values))):
        try:
            ids += codec.encode([value for _, value in chunk])
        except ValueError:
            for number, value in chunk:
                try:
                    ids += codec.encode([value])
                except ValueError as error:
                    broken.add(f"row {number}", error)
    return ids


def measure_stretch(model: ZipperModel, rows: Sequence[Any]) -> None:
    """Set `ZipSpec.stretch` of every zip that has none: tokens of its reader per token of its source, over all coded
    rows and documents that hold both. Without such rows it stays as it is."""
    lengths = [
        {m: tokens + parts for m, (tokens, parts) in counts.items()} for counts in token_counts(rows)
    ]  # with BOS
    for spec in model.config.zip_specs:
        both = [n for n in lengths if spec.reader in n and spec.source in n]
        if spec.stretch is None and both:
            ratio = sum(n[spec.reader] for n in both) / sum(n[spec.source] for n in both)
            model.set_stretch(spec.reader, spec.source, round(ratio, 4))


def token_counts(rows: Sequence[Any]) -> Iterator[dict[str, tuple[int, int]]]:
    """Of each encoded row or document, by modality: tokens without BOS and EOS, and segments."""
    if isinstance(rows, Joined):
        for part in rows.parts:
            yield from token_counts(part)
    elif isinstance(rows, PreparedRows) and (lengths := rows.lengths()):
        for each in zip(*lengths.values()):
            yield {m: (int(tokens), 1) for m, tokens in zip(lengths, each)}
    else:
        for row in rows:
            counts: dict[str, tuple[int, int]] = {}
            for segment in row if isinstance(row, Document) else row.values():
                tokens, segments = counts.get(segment.modality, (0, 0))
                counts[segment.modality] = tokens + len(segment.ids or []), segments + 1
            yield counts


def _told(steps: Iterable[T], what: str, total: int | None) -> Iterable[T]:
    """With a progress bar on standard error: standard output is for results."""
    return barred(steps, main_console(), what, total)
