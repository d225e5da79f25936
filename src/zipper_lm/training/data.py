"""Rows to encoded rows: every value through its codec once, before training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import track

from zipper_lm.data.readers import read_rows
from zipper_lm.data.recombine import recombine
from zipper_lm.document import Document
from zipper_lm.modality.codec import Codec
from zipper_lm.processor import ZipperProcessor
from zipper_lm.training.recipes import DataRecipe

if TYPE_CHECKING:
    from zipper_lm.model import ZipperModel

CHUNK = 64


def training_rows(data: DataRecipe, seed: int = 0) -> list[Any]:
    """The training split as the recipe wants it: limited, drawn from, excluded from, and with recombined clips.

    Raises:
        ValueError: as `read_rows`, or if nothing is left.
    """
    rows = [r for r in read_rows(data.source, data.columns, data.train, data.limit) if _wanted(r, data)]
    if data.fraction < 1.0:
        count = max(1, round(data.fraction * len(rows)))
        rows = [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:count])]
    if not rows:
        raise ValueError(f"data: {data.source} has no rows left in split {data.train!r} after data.exclude")
    if data.clips is not None:
        clips = [r for r in read_rows(data.clips.source, data.columns) if _wanted(r, data)]
        rows += recombine(clips, data.clips.count, words=data.clips.words, seed=seed)
    return rows


def _wanted(row: Any, data: DataRecipe) -> bool:
    return isinstance(row, Document) or all(str(row.get(c)) not in values for c, values in data.exclude.items())


def validation_rows(data: DataRecipe) -> list[Any]:
    """The first rows of the validation split, without what is excluded; empty if the recipe has none.

    Raises:
        ValueError: as `read_rows`, or if nothing is left.
    """
    if data.validation is None:
        return []
    if not data.exclude:
        return list(read_rows(data.source, data.columns, data.validation, data.validation_limit))
    rows = [r for r in read_rows(data.source, data.columns, data.validation) if _wanted(r, data)]
    if not rows:
        raise ValueError(f"data: {data.source} has no rows left in split {data.validation!r} after data.exclude")
    return rows[: data.validation_limit]


def encode_rows(processor: ZipperProcessor, rows: Sequence[Any], modalities: Sequence[str]) -> list[Any]:
    """Rows whose values are `Segment`s with ids (text keeps its value too), documents with ids.

    Raises:
        ValueError: on a row without one of the modalities, or a value that its codec cannot read; the message says
            which row.
    """
    encoded: list[Any] = []
    for start in _told(range(0, len(rows), CHUNK), "encoding"):
        chunk = rows[start : start + CHUNK]
        documents = [_as_document(row, modalities, start + i) for i, row in enumerate(chunk)]
        try:
            coded = processor.encode(documents)
        except ValueError:
            coded = [_alone(processor, document, start + i) for i, document in enumerate(documents)]
        for row, document in zip(chunk, coded):
            for segment in document:
                if not isinstance(segment.value, str) or segment.modality != "text":
                    segment.value = None
            encoded.append(document if isinstance(row, Document) else dict(zip(modalities, document)))
    return encoded


def _as_document(row: Any, modalities: Sequence[str], number: int) -> Document:
    if isinstance(row, Document):
        return row
    if missing := [m for m in modalities if row.get(m) is None]:
        raise ValueError(f"data row {number}: no {missing}; it has {sorted(row)}; name columns in data.columns")
    return Document([(m, row[m]) for m in modalities])


def _alone(processor: ZipperProcessor, document: Document, number: int) -> Document:
    try:
        return processor.encode([document])[0]
    except ValueError as error:
        raise ValueError(f"data row {number}: {error}") from error


def column(rows: Sequence[Any], modality: str) -> list[Any]:
    """All raw values of one modality, from rows and from whole documents.

    Raises:
        ValueError: if there is none.
    """
    values: list[Any] = []
    for row in rows:
        if isinstance(row, Document):
            values += [s.value for s in row if s.modality == modality and s.value is not None]
        elif row.get(modality) is not None:
            values.append(row[modality])
    if not values:
        first = rows[0] if len(rows) else {}
        has = first.modalities if isinstance(first, Document) else sorted(first)
        raise ValueError(f"data: no row has {modality!r}; they have {has}; name the column in data.columns")
    return values


def encode_column(codec: Codec, values: Sequence[Any]) -> list[list[int]]:
    """One modality's values to ids, in chunks, with a progress bar.

    Raises:
        ValueError: on a value that the codec cannot read; the message says which row.
    """
    ids: list[list[int]] = []
    for start in _told(range(0, len(values), CHUNK), "encoding"):
        chunk = values[start : start + CHUNK]
        try:
            ids += codec.encode(chunk)
        except ValueError:
            for number, value in enumerate(chunk, start):
                try:
                    ids += codec.encode([value])
                except ValueError as error:
                    raise ValueError(f"data row {number}: {error}") from error
    return ids


def measure_stretch(model: ZipperModel, rows: Sequence[Any]) -> None:
    """Set `ZipSpec.stretch` of every zip that has none: tokens of its reader per token of its source, over all coded
    rows and documents that hold both. Without such rows it stays as it is."""
    lengths = [_lengths(row) for row in rows]
    for spec in model.config.zip_specs:
        both = [n for n in lengths if spec.reader in n and spec.source in n]
        if spec.stretch is None and both:
            ratio = sum(n[spec.reader] for n in both) / sum(n[spec.source] for n in both)
            model.set_stretch(spec.reader, spec.source, round(ratio, 4))


def _lengths(row: Any) -> dict[str, int]:
    """Tokens of each modality in a row or document, BOS counted."""
    lengths: dict[str, int] = {}
    for segment in row if isinstance(row, Document) else row.values():
        lengths[segment.modality] = lengths.get(segment.modality, 0) + len(segment.ids or []) + 1
    return lengths


def _told(steps: Iterable[int], what: str) -> Iterable[int]:
    """With a progress bar on standard error: standard output is for results."""
    return track(steps, description=what, transient=True, console=Console(stderr=True))
