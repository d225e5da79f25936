"""The rows that a recipe's data names: which split of what, how many of them, and without whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from zipper_lm.codecs.codec import Codec
from zipper_lm.data.broken import Broken
from zipper_lm.data.clips import recombine
from zipper_lm.data.encoding import Joined, token_counts
from zipper_lm.data.prepared import TRAIN, VALIDATION, PreparedRows, is_prepared, open_prepared
from zipper_lm.data.sources.readers import Rows, Stream, read_rows, stream_rows
from zipper_lm.data.sources.table import fingerprint_of, readable
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.jobs.recipes.reader import build
from zipper_lm.jobs.recipes.schema import DataRecipe

Opened = Rows | Stream | PreparedRows
"""A split that is open: rows are read when they are asked for; those that were prepared are encoded."""


def identity_of(rows: Any) -> list[Any] | None:
    """What differs if the rows are others than before: their number and a fingerprint. Of a stream nothing is known."""
    if not isinstance(rows, Sequence):
        return None
    return [len(rows), rows.fingerprint() if isinstance(rows, Rows) else fingerprint_of(rows)]


class DataSource:
    """The rows that a recipe's data names, raw or prepared.

    Args:
        data: the recipe's.

    Attributes:
        prepared: what `zipper prepare` wrote, if that is what it names; opened once.

    Raises:
        ValueError: if prepared data cannot be read, or cannot follow a setting.
    """

    def __init__(self, data: DataRecipe) -> None:
        self.data = data
        self.prepared = open_prepared(data.source) if is_prepared(data.source) else None
        if self.prepared is not None:
            _check_as_prepared(data, self.prepared.description["data"])

    @property
    def originals(self) -> DataRecipe:
        """What was prepared, as a recipe; of raw data, its own."""
        return self.data if self.prepared is None else build(DataRecipe, self.prepared.description["data"])

    def check_modalities(self, wanted: Iterable[str]) -> None:
        """Raise `ValueError` if a modality that is wanted was not prepared; raw rows tell when they are read."""
        if self.prepared is not None:
            self.prepared.check_modalities(wanted)

    def check_codecs(self, codecs: Mapping[str, Codec]) -> None:
        """Raise `ValueError` if ids were made with another codec."""
        if self.prepared is not None:
            self.prepared.check_codecs(codecs)

    def identity(self, opened: Opened, held_out: Any) -> dict[str, Any]:
        """What differs if the data is not what it was: of prepared data the hashes of its shards, else `identity_of`
        each split. What a sound file holds is not looked at."""
        if self.prepared is not None:
            return {
                name: fingerprint_of(split["shards"]) for name, split in self.prepared.description["splits"].items()
            }
        return {TRAIN: identity_of(opened), VALIDATION: identity_of(held_out)}

    def open(self, split: str, *, check: bool = True) -> Opened:
        """A split as it is read, without what is excluded: of the training split no more than the recipe's limit.

        Args:
            split: ``"train"`` or ``"validation"``; how the source calls it, the recipe says.
            check: whether a row that lacks a value or a file is an error at once, unless `data.broken_limit` allows
                some.

        Raises:
            ValueError: as `read_rows` and `Prepared.rows`; if nothing is left.
        """
        data = self.data
        name = data.train if split == TRAIN else str(data.validation)
        limit = data.limit if split == TRAIN else data.validation_limit
        read = None if data.exclude else limit  # what is excluded does not count
        exclude: Mapping[str, Sequence[str]] = data.exclude
        if self.prepared is not None:
            rows: Any = self.prepared.rows(split)
            done = self.prepared.description["data"]["exclude"]
            exclude = {c: values for c, values in exclude.items() if not set(values) <= set(done.get(c, ()))}
        else:
            open_rows: Callable[..., Rows | Stream] = stream_rows if data.streaming else read_rows
            check = check and data.broken_limit == 0
            rows = open_rows(data.source, data.columns, name, read, revision=data.revision, check=check)
        if exclude:
            rows = rows.without(exclude)
        rows = rows.first(limit) if isinstance(rows, Stream) else rows[:limit]
        if exclude and next(readable(rows), None) is None:
            raise ValueError(f"data: {data.source} has no rows left in split {name!r} after data.exclude")
        return rows

    def training_rows(
        self, seed: int = 0, opened: Opened | None = None, broken: Broken | None = None
    ) -> Sequence[Any] | Stream:
        """The training split as the recipe wants it: limited, drawn from, excluded from, and with recombined clips.

        Args:
            seed: of what is drawn. opened: the split from `open`, if that is done.
            broken: where clips that cannot be read are listed; `None` allows none.

        Raises:
            ValueError: as `open` and `clips`.
        """
        rows = self.open(TRAIN) if opened is None else opened
        if self.data.fraction < 1.0:
            assert not isinstance(rows, Stream)
            count = max(1, round(self.data.fraction * len(rows)))
            rows = rows.select(sorted(np.random.default_rng(seed).permutation(len(rows))[:count].tolist()))
        if self.data.clips is None:
            return rows
        assert not isinstance(rows, Stream)
        return Joined(rows, self.clips(seed, broken))

    def clips(self, seed: int, broken: Broken | None = None) -> Sequence[Any]:
        """The recombined utterances that the recipe asks for.

        Args:
            seed: of the draw. broken: where clips that cannot be read are listed; `None` allows none.

        Raises:
            ValueError: as `read_rows` and `recombine`, or if prepared data has others or none.
        """
        wanted, exclude = self.data.clips, self.data.exclude
        assert wanted is not None
        if self.prepared is not None:
            return self.prepared.clips(asdict(wanted), seed, exclude)
        check = broken is None or broken.limit == 0
        clips = read_rows(wanted.source, self.data.columns, check=check).without(exclude)
        return list(recombine(clips, wanted.count, words=wanted.words, seed=seed, broken=broken))

    def validation_rows(self, *, check: bool = True) -> Sequence[Any]:
        """The first rows of the validation split, without what is excluded; empty if the recipe has none.

        Args:
            check: as of `open`.

        Raises:
            ValueError: as `open`.
        """
        if self.data.validation is None:
            return []
        rows, limit = self.open(VALIDATION, check=check), self.data.validation_limit
        return list(islice(rows, limit)) if isinstance(rows, Stream) else rows[:limit]


def _check_as_prepared(data: DataRecipe, before: Mapping[str, Any]) -> None:
    """Raise `ValueError` for settings that would have no effect, because the data was prepared with others. Names that
    are left at their default are as prepared."""
    plain = DataRecipe(source=data.source)
    if data.buffer is not None:
        raise ValueError(f"data.buffer={data.buffer} has no effect: {data.source} is prepared, and read where it lies")
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


def measure_stretch(model: ZippedTowers, rows: Sequence[Any]) -> None:
    """Set `ZipSpec.stretch` of every zip that has none: tokens of its reader per token of its source, over all coded
    rows and documents that hold both. Without such rows it stays as it is."""
    open_specs = [spec for spec in model.config.zip_specs if spec.stretch is None]
    sums = np.zeros((len(open_specs), 2), np.int64)
    for counts in token_counts(rows) if open_specs else ():
        for number, spec in enumerate(open_specs):
            if spec.reader in counts and spec.source in counts:
                sums[number] += [sum(counts[spec.reader]), sum(counts[spec.source])]  # tokens, and a BOS for each part
    for spec, (read, source) in zip(open_specs, sums.tolist()):
        if source:
            model.set_stretch(spec.reader, spec.source, round(read / source, 4))
