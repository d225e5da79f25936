"""Aligned data from folders, JSONL files and Hugging Face `datasets`, as one lazy sequence of rows.

Nothing here decodes sound or pictures: a row holds a path or the file's bytes, and the codec reads it later. How each
kind of source is read: `folders.py`, `jsonl.py`, `tars.py`, `objects.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any, overload

from zipper_lm.codecs.picture import is_picture
from zipper_lm.data.document import Document
from zipper_lm.data.sources.folders import folder_splits
from zipper_lm.data.sources.jsonl import jsonl_loader
from zipper_lm.data.sources.objects import hub_splits, object_splits
from zipper_lm.data.sources.table import (
    WHOLE,
    Loader,
    Table,
    fingerprint_of,
    missing_file,
    readable,
    undecoded,
    usual_name,
)
from zipper_lm.data.sources.tars import find_shards, is_tar, tar_splits

DEFAULT_COLUMNS: dict[str, tuple[str, ...]] = {
    "speech": ("speech", "audio", "file_name", "flac", "wav", "mp3", "ogg", "opus"),
    "text": ("text", "text_normalized", "transcription", "transcript", "sentence", "caption", "txt"),
    "image": ("jpg", "jpeg", "png", "webp"),
}
"""Where a modality is looked for, in this order, unless `columns` says."""
PREPARED_FILE = "prepared.json"
"""What `zipper prepare` writes last (`zipper_lm.data.prepared`)."""
_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(?::(?P<config>[\w.-]+))?")


class Rows(Sequence[Any]):  # of `Row | Document`; which of them, the caller knows from the source
    """A lazy sequence of rows: `rows[i]` reads one row, a slice is again `Rows`.

    Items are dicts from modality name to raw value, plus the columns that no modality took; a JSONL line
    that is a whole document is a `Document`.
    """

    def __init__(self, table: Table, columns: Mapping[str, str], indices: Sequence[int]) -> None:
        self._table = table
        self._indices = indices
        self.columns = dict(columns)
        """Modality name to the column its values come from."""

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Rows(self._table, self.columns, self._indices[index])
        return _as_row(self._table, self.columns, self._rows[self._indices[index]])

    def select(self, numbers: Sequence[int]) -> Rows:
        """The rows of these numbers, in this order."""
        return Rows(self._table, self.columns, [self._indices[n] for n in numbers])

    def without(self, exclude: Mapping[str, Sequence[str]]) -> Rows:
        """All rows but those with one of the values in a column; whole documents stay, and what cannot be read.

        Raises:
            ValueError: if there is no such column.
        """
        known = self._table.columns
        if known is None:
            known = list({key for row in self._table.rows if not isinstance(row, Document) for key in row})
        if known:
            check_excluded(exclude, [*known, *self.columns])
        values = {c: self.column(c) for c in exclude}
        return self.select([n for n in range(len(self)) if all(str(values[c][n]) not in v for c, v in exclude.items())])

    def fingerprint(self) -> str:
        """Changes when the source does: of files in tars by their size and time, of all else by what the rows say."""
        if self._table.fingerprint:
            return self._table.fingerprint
        return fingerprint_of((self.where(n), self._rows[index]) for n, index in enumerate(self._indices))

    def where(self, number: int) -> str:
        """Where a row is written, for messages."""
        index = self._indices[number]
        return self._table.where[index] if self._table.where else f"row {index}"

    def column(self, name: str) -> list[Any]:
        """All values of one modality or column, without touching the others; `None` for whole documents, and for what
        cannot be read."""
        column = self.columns.get(name, name)
        if hasattr(self._rows, "select_columns"):  # a datasets.Dataset
            values = self._rows.select_columns([column])[self._indices][column]
            return [_value(self._table, self.columns, column, value) for value in values]
        return [self._cell(index, column) for index in self._indices]

    def _cell(self, index: int, column: str) -> Any:
        try:
            raw = self._rows[index]
        except ValueError:  # whoever encodes the row is told
            return None
        return None if isinstance(raw, Document) else _value(self._table, self.columns, column, raw.get(column))

    @property
    def _rows(self) -> Any:  # a sequence, or a datasets.Dataset, which is none by name
        return self._table.rows


class Stream(Iterable[Any]):
    """Rows without a length, read anew, one after the other, each time; nothing of them is kept."""

    def __init__(self, table: Table, columns: Mapping[str, str], exclude: Mapping[str, Sequence[str]]) -> None:
        self._table = table
        self._limit: int | None = None
        self.columns = dict(columns)
        """Modality name to the column its values come from."""
        modalities = {column: modality for modality, column in self.columns.items()}
        self._exclude = [(modalities.get(c, c), values) for c, values in exclude.items()]

    def __iter__(self) -> Iterator[Any]:
        return self.run()

    def run(self, state: Any = None, done: int = 0) -> Run:
        """The rows from some place on.

        Args:
            state: of a run of this stream that had come there; `None` is the beginning. done: the rows before it.
        """
        # It knows itself which row comes next, and what it is made of remembers a state that it was given once.
        raw: Any = copy.deepcopy(self._table.rows)
        if state is not None:
            raw.load_state_dict(copy.deepcopy(state))  # which goes on in it
        return Run(raw, self._rows(raw), None if self._limit is None else self._limit - done)

    def _rows(self, found: Iterable[Any]) -> Iterator[Any]:
        for raw in found:
            row = _as_row(self._table, self.columns, raw)
            if all(str(row.get(c)) not in values for c, values in self._exclude):
                yield row

    def first(self, limit: int | None) -> Stream:
        """The first rows; `None` is all."""
        found = copy.copy(self)
        found._limit = limit
        return found

    def without(self, exclude: Mapping[str, Sequence[str]]) -> Stream:
        """All rows but those with one of the values in a column.

        Raises:
            ValueError: if there is no such column.
        """
        check_excluded(exclude, [*(_column_names(self._table) or ()), *self.columns])
        return Stream(self._table, self.columns, exclude)


class Run(Iterator[Any]):
    """Rows of a stream, one after the other.

    Args:
        stream: a `datasets.IterableDataset`, or what stands for one. rows: made of it. limit: of rows.
    """

    def __init__(self, stream: Any, rows: Iterator[Any], limit: int | None) -> None:
        self._stream, self._rows = stream, islice(rows, limit)

    def __next__(self) -> Any:
        return next(self._rows)

    def state(self) -> Any:
        """Where it stands, as plain values; `Stream.run` goes on from there."""
        return self._stream.state_dict()


def check_excluded(exclude: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ValueError` if one of the columns to exclude by is not among those known."""
    if unknown := sorted(set(exclude) - set(known)):
        raise ValueError(f"data.exclude: there is no column {unknown}; there are {sorted(set(known))}")


def _as_row(table: Table, columns: Mapping[str, str], raw: Any) -> Any:
    if isinstance(raw, Document):
        return raw
    taken = {*columns.values(), *columns}
    row = {modality: _value(table, columns, c, raw.get(c)) for modality, c in columns.items()}
    return row | {c: _value(table, columns, c, v) for c, v in raw.items() if c not in taken}


def _value(table: Table, columns: Mapping[str, str], column: str, value: Any) -> Any:
    if column in columns.values() or (isinstance(value, dict) and {"bytes", "path"} == value.keys()):
        value = undecoded(value)  # an Audio or Image feature
    if getattr(value, "ndim", None) == 0:  # a number of numpy or torch
        value = value.item()
    if column in table.labels and isinstance(value, int):
        return table.labels[column][value] if value >= 0 else None  # -1 is no class at all
    if column not in (columns.get("text"), *DEFAULT_COLUMNS["text"]):
        try:
            return table.files.resolve(value, f"column {column!r}")
        except ValueError:  # of a column that nobody reads it is but a text, such as where a sound came from
            if column in columns.values():
                raise
    return value


def read_rows(
    source: Any,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
    *,
    revision: str | None = None,
    check: bool = True,
) -> Rows:
    """Open a data set.

    Args:
        source: one of

            - a folder with ``metadata.csv`` or ``metadata.jsonl``, whose column ``file_name`` names a sound or
              a picture (`audiofolder`, `imagefolder`): in one sub-folder per split, in the folder itself with
              files in sub-folders named after splits, or flat. The path is in column ``audio`` (``image`` for
              pictures) and in ``file_name``. Without metadata, files in sub-folders named after what they show,
              which is their text: ``train/cat/1.png`` or ``cat/1.png``; or files alone, of which nothing else is
              known (unaligned data): ``train/1.wav`` or ``1.wav``;
            - WebDataset tars (`zipper_lm.data.sources.tars`): one, a pattern such as ``shards-{0000..0007}.tar`` or
              ``train-*.tar``, or a folder of them, or one such folder per split;
            - a JSONL file of rows or of whole documents, ``{"segments": [{"modality": "speech",
              "value": "a.wav"}, {"modality": "text", "value": "one", "target": true}]}``, or a folder with one
              such file per split. A string with the suffix of a sound or picture file, except in text, is a
              path relative to the JSONL file;
            - a `datasets.Dataset` or a plain list of dicts, taken whole whatever `split` says; a
              `datasets.DatasetDict`; a folder written by ``save_to_disk``; or the id of a data set on the Hub,
              ``"owner/name"`` or ``"owner/name:config"``.
        columns: modality name to column; a modality that is not named is looked for by `DEFAULT_COLUMNS`.
        split: ``"validation"`` also finds ``"valid"``, ``"val"`` and ``"dev"``, and so on. A flat folder or a
            single file is the split that its name says, else ``"train"``.
        limit: read only the first rows.
        revision: of a Hub id: commit, tag or branch.
        check: whether a row without a value, or whose file does not exist, is an error at once; otherwise it is one
            when its value is read.

    Raises:
        ValueError: for a missing source, revision, split (naming those there) or column (naming those there), a file
            that the metadata names and that does not exist, a malformed line (as ``file:line``), a document
            with unknown keys, no segments or no target, a tar that is cut off, and for a data set without rows.
    """
    rows = _open(source, columns or {}, split, limit, revision, check)
    assert isinstance(rows, Rows)
    return rows


def stream_rows(
    source: Any,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
    *,
    revision: str | None = None,
    check: bool = True,
) -> Rows | Stream:
    """As `read_rows`, but a data set on the Hub is not fetched as a whole: its rows come over the network one after the
    other, up to `limit` or to its end. All else is read row by row anyway.

    Raises:
        ValueError: as `read_rows`.
    """
    return _open(source, columns or {}, split, limit, revision, check, streaming=True)


def _open(
    source: Any,
    columns: Mapping[str, str],
    split: str,
    limit: int | None,
    revision: str | None,
    check: bool,
    streaming: bool = False,
) -> Rows | Stream:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"data: limit must be a whole number of at least 1, got {limit!r}")
    splits = _splits(source, revision, streaming)
    name = _pick(splits, split, source)
    table = splits[name](limit)
    if next(readable(table.rows), None) is None:
        raise ValueError(f"data: {_called(source)} has no rows in split {name!r}" if name else "data: no rows")
    chosen = _choose_columns(table, columns, source)
    if not isinstance(table.rows, Sized):
        return Stream(table, chosen, {})
    rows = Rows(table, chosen, range(len(table.rows)))
    if check:
        _check_rows(rows, table)
    return rows


def list_splits(source: Any, revision: str | None = None) -> list[str]:
    """Names of the splits of a source, as `read_rows` takes both; empty if the source is taken whole.

    Raises:
        ValueError: if there is no such source.
    """
    return [name for name in _splits(source, revision) if name]


def _splits(source: Any, revision: str | None = None, streaming: bool = False) -> dict[str, Loader]:
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if is_tar(path) and not path.is_dir():
            return tar_splits(find_shards(path))
        if path.is_file():
            return {usual_name(path.stem, "train"): jsonl_loader(path, from_root=True)}
        if (path / PREPARED_FILE).is_file():
            raise ValueError(
                f"data: {source} holds prepared ids only (`zipper prepare`), to train on; give the raw data"
            )
        if path.is_dir():
            return folder_splits(path)
        match = _HUB_ID.fullmatch(str(source))
        if match and not path.parent.exists():
            return hub_splits(match["id"], match["config"], revision, streaming)
        raise ValueError(f"data: no file or folder {str(source)!r}")
    return object_splits(source, streaming)


def _pick(splits: Mapping[str, Loader], split: str, source: Any) -> str:
    if WHOLE in splits:
        return WHOLE
    if split in splits:
        return split
    same = [name for name in splits if usual_name(name, name) == usual_name(split, split)]
    if len(same) == 1:
        return same[0]
    problem = f"split {split!r} may be any of {same}" if same else f"no split {split!r}"
    raise ValueError(f"data: {problem} in {_called(source)}; it has {sorted(splits)}")


def _called(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the given {type(source).__name__}"


def _choose_columns(table: Table, columns: Mapping[str, str], source: Any) -> dict[str, str]:
    names = _column_names(table)
    if names is None:  # documents name their modalities themselves
        return {}
    for modality, column in columns.items():
        if column not in names:
            raise ValueError(
                f"data: {_called(source)} has no column {column!r} for modality {modality!r}; it has {sorted(names)}"
            )
    chosen = dict(columns)
    for modality, candidates in DEFAULT_COLUMNS.items():
        pictures = ("file_name",) if _names_pictures(table) else ()  # they have file names too
        found = next((c for c in candidates if c in names and c not in (*chosen.values(), *pictures)), None)
        if modality not in chosen and found:
            chosen[modality] = found
    return chosen


def _names_pictures(table: Table) -> bool:
    """Whether the column ``file_name`` of the first row names a picture."""
    first = next((row for row in readable(table.rows) if not isinstance(row, Document)), None)
    name = first.get("file_name") if isinstance(first, Mapping) else None
    return isinstance(name, str) and is_picture(name)


def _column_names(table: Table) -> list[str] | None:
    if table.columns is not None:
        return list(table.columns)
    first = next((row for row in readable(table.rows) if not isinstance(row, Document)), None)
    return None if first is None else list(first)


def _check_rows(rows: Rows, table: Table) -> None:
    """Each row has a value in each chosen column, and the files that it names exist."""
    problems = list(table.problems)
    for number, raw in enumerate(table.rows if table.columns is None else ()):
        if isinstance(raw, Document):
            continue
        for modality, column in rows.columns.items():
            if raw.get(column) is None:
                raise ValueError(
                    f"data: {table.where[number]}: no value in column {column!r} for modality {modality!r}; "
                    f"the columns are {sorted(raw)}"
                )
            if table.files.folders and modality != "text":
                file = table.files.resolve(undecoded(raw[column]), table.where[number])
                problems += missing_file(file, table.where[number])
    problems = list(dict.fromkeys(problems))  # a column may be a modality's and the metadata's file_name
    if problems:
        raise ValueError(f"data: {problems[0]}" + (f" (so do {len(problems) - 1} more)" if problems[1:] else ""))
