"""The rows that a recipe's data names: which split of what, how many of them, and without whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from zipper_lm.data.broken import Broken
from zipper_lm.data.clips import recombine
from zipper_lm.data.encoding import Joined, token_counts
from zipper_lm.data.prepared import TRAIN, VALIDATION, PreparedRows, is_prepared, open_prepared
from zipper_lm.data.sources.readers import Rows, Stream, read_rows, stream_rows
from zipper_lm.data.sources.table import readable
from zipper_lm.jobs.recipes.schema import DataRecipe

if TYPE_CHECKING:
    from zipper_lm.fusion.network import ZippedTowers

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
        return open_prepared(data.source).clips(asdict(data.clips), seed, data.exclude)
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


def measure_stretch(model: ZippedTowers, rows: Sequence[Any]) -> None:
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
