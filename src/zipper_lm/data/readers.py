"""Aligned data from folders, JSONL files and Hugging Face `datasets`, as one lazy sequence of rows.

Nothing here decodes sound or pictures: a row holds a path or the file's bytes, and the codec reads it later.
Folders in the form of the `audiofolder` loader (https://huggingface.co/docs/datasets/audio_dataset) are read
directly, not through `datasets`, whose loader needs torchcodec even to keep audio undecoded, copies the data
into a cache, and guesses types (a transcription "007" would become the number 7).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from zipper_lm.document import Document, Segment

if TYPE_CHECKING:
    pass

Row = dict[str, Any]
"""Modality name to raw value, and further columns under their own names."""

DEFAULT_COLUMNS: dict[str, tuple[str, ...]] = {
    "speech": ("speech", "audio", "file_name"),
    "text": ("text", "transcription", "transcript", "sentence"),
}
"""Where a modality is looked for, in this order, unless `columns` says."""

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
_SOUND_SUFFIXES = frozenset(
    (".aac", ".aif", ".aiff", ".au", ".caf", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".sph", ".wav", ".wave")
)
_MEDIA_SUFFIXES = _IMAGE_SUFFIXES | _SOUND_SUFFIXES
_METADATA = ("metadata.csv", "metadata.jsonl")
_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(?::(?P<config>[\w.-]+))?")


class Rows(Sequence[Any]):  # of `Row | Document`; which of them, the caller knows from the source
    """A lazy sequence of rows: `rows[i]` reads one row, a slice is again `Rows`.

    Items are dicts from modality name to raw value, plus the columns that no modality took; a JSONL line
    that is a whole document is a `Document`.
    """

    def __init__(self, table: _Table, columns: Mapping[str, str], indices: range) -> None:
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
        raw = self._table.rows[self._indices[index]]
        if isinstance(raw, Document):
            return raw
        taken = {*self.columns.values(), *self.columns}
        row = {modality: self._value(c, raw[c]) for modality, c in self.columns.items()}
        return row | {c: self._value(c, v) for c, v in raw.items() if c not in taken}

    def column(self, name: str) -> list[Any]:
        """All values of one modality or column, without touching the others; `None` for whole documents."""
        column = self.columns.get(name, name)
        if self._table.is_dataset:
            values = self._table.rows.select_columns([column])[self._indices][column]  # type: ignore[attr-defined]
            return [self._value(column, value) for value in values]
        rows = (self._table.rows[i] for i in self._indices)
        return [None if isinstance(row, Document) else self._value(column, row.get(column)) for row in rows]

    def _value(self, column: str, value: Any) -> Any:
        if isinstance(value, dict) and {"bytes", "path"} == value.keys():  # an undecoded Audio or Image feature
            return value["path"] if value["bytes"] is None else value["bytes"]
        if self._table.folder and column not in (self.columns.get("text"), *DEFAULT_COLUMNS["text"]):
            return _resolve(value, self._table.folder)
        return value


def read_rows(
    source: Any, columns: Mapping[str, str] | None = None, split: str = "train", limit: int | None = None
) -> Rows:
    """Open a data set.

    Args:
        source: one of

            - a folder with ``metadata.csv`` or ``metadata.jsonl``, whose column ``file_name`` names a sound or
              a picture (`audiofolder`, `imagefolder`): in one sub-folder per split, in the folder itself with
              files in sub-folders named after splits, or flat. The path is in column ``audio`` (``image`` for
              pictures) and in ``file_name``;
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

    Raises:
        ValueError: for a missing source, split (naming those there) or column (naming those there), a file
            that the metadata names and that does not exist, a malformed line (as ``file:line``), a document
            with unknown keys, no segments or no target, and for a data set without rows.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"data: limit must be a whole number of at least 1, got {limit!r}")
    splits = _splits(source)
    name = _pick(splits, split, source)
    table = splits[name](limit)
    if not len(table.rows):
        raise ValueError(f"data: {_called(source)} has no rows in split {name!r}" if name else "data: no rows")
    chosen = _choose_columns(table, columns or {}, source)
    rows = Rows(table, chosen, range(len(table.rows)))
    if not table.is_dataset:
        _check_rows(rows, table)
    return rows


def list_splits(source: Any) -> list[str]:
    """Names of the splits of a source, as `read_rows` takes it; empty if the source is taken whole.

    Raises:
        ValueError: if there is no such source.
    """
    return [name for name in _splits(source) if name]


@dataclass(frozen=True)
class _Table:
    """Rows before columns are chosen. `where` says for messages where row i is written."""

    rows: Sequence[Any]
    where: Sequence[str] = ()
    folder: Path | None = None
    """What relative paths in the rows start from."""
    is_dataset: bool = False


_Loader = Callable[[int | None], _Table]
_WHOLE = ""  # the name of the only "split" of a source that has none


# Finding the split


def _splits(source: Any) -> dict[str, _Loader]:
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_file():
            return {_canonical(path.stem, "train"): lambda limit: _read_jsonl(path, limit)}
        if path.is_dir():
            return _folder_splits(path)
        match = _HUB_ID.fullmatch(str(source))
        if match and not path.parent.exists():
            return _hub_splits(match["id"], match["config"])
        raise ValueError(f"data: no file or folder {str(source)!r}")
    return _object_splits(source)


def _pick(splits: Mapping[str, _Loader], split: str, source: Any) -> str:
    if _WHOLE in splits:
        return _WHOLE
    if split in splits:
        return split
    same = [name for name in splits if _canonical(name, name) == _canonical(split, split)]
    if len(same) == 1:
        return same[0]
    problem = f"split {split!r} may be any of {same}" if same else f"no split {split!r}"
    raise ValueError(f"data: {problem} in {_called(source)}; it has {sorted(splits)}")


def _canonical(name: str, otherwise: str) -> str:
    """The usual name of a split: ``"dev"`` is ``"validation"``."""
    return next((usual for usual, names in _SPLIT_NAMES.items() if name.lower() in names), otherwise)


def _called(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the given {type(source).__name__}"


# Folders


def _folder_splits(folder: Path) -> dict[str, _Loader]:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _disk_splits(folder)
    if metadata := _metadata_of(folder):
        return _metadata_splits(metadata)
    found: dict[str, _Loader] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and (metadata := _metadata_of(entry)):
            found[entry.name] = _metadata_loader(metadata, "")
        elif entry.suffix == ".jsonl" and _canonical(entry.stem, ""):
            found[entry.stem] = _jsonl_loader(entry)
    if not found:
        raise ValueError(
            f"data: {folder} has no metadata.csv or metadata.jsonl (nor have its sub-folders), no JSONL file named "
            "after a split, and was not written by datasets' save_to_disk"
        )
    return found


def _metadata_of(folder: Path) -> Path | None:
    files = [folder / name for name in _METADATA if (folder / name).is_file()]
    if len(files) > 1:
        raise ValueError(f"data: {folder} has both metadata.csv and metadata.jsonl; keep one")
    return files[0] if files else None


def _metadata_splits(metadata: Path) -> dict[str, _Loader]:
    """One metadata file: flat, or with all its files in sub-folders named after splits."""
    tops = {Path(_file_name(where, row)).parts[0] for where, row in _metadata_lines(metadata)}
    if tops and all(_canonical(top, "") and (metadata.parent / top).is_dir() for top in tops):
        return {top: _metadata_loader(metadata, top) for top in sorted(tops)}
    return {_canonical(metadata.parent.resolve().name, "train"): _metadata_loader(metadata, "")}


def _metadata_loader(metadata: Path, top: str) -> _Loader:
    return lambda limit: _read_metadata(metadata, top, limit)


def _jsonl_loader(file: Path) -> _Loader:
    return lambda limit: _read_jsonl(file, limit)


def _read_metadata(metadata: Path, top: str, limit: int | None) -> _Table:
    lines = (
        (where, row)
        for where, row in _metadata_lines(metadata)
        if not top or Path(_file_name(where, row)).parts[0] == top
    )
    wheres, rows, missing = [], [], []
    for where, row in islice(lines, limit):
        name = _file_name(where, row)
        path = metadata.parent / name
        if not path.is_file():
            missing.append(f"{where}: file {name!r} does not exist")
        kind = "image" if path.suffix.lower() in _IMAGE_SUFFIXES else "audio"
        wheres.append(where)
        rows.append({kind: str(path)} | row | {"file_name": str(path)})
    if missing:
        raise ValueError(f"data: {missing[0]}" + (f" (so do {len(missing) - 1} more)" if missing[1:] else ""))
    return _Table(rows, wheres)


def _file_name(where: str, row: Row) -> str:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"data: {where}: no file_name; the columns are {sorted(row)}")
    return name


def _metadata_lines(metadata: Path) -> Iterator[tuple[str, Row]]:
    return _csv_lines(metadata) if metadata.suffix == ".csv" else _json_lines(metadata)


def _csv_lines(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise ValueError(f"data: {file}:1: a column name comes twice in {list(names)}")
            for row in reader:
                where = f"{file}:{reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"data: {where}: not as many fields as the {len(names)} columns of line 1")
                yield where, dict(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data: {file} is not readable as UTF-8 CSV: {error}") from error


# JSONL


def _json_lines(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ValueError(f"data: {file}:{number}: malformed JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"data: {file}:{number}: expected a JSON object, got {type(row).__name__}")
                yield f"{file}:{number}", row
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {file} is not UTF-8 text: {error}") from error


def _read_jsonl(file: Path, limit: int | None) -> _Table:
    wheres, rows = [], []
    for where, row in islice(_json_lines(file), limit):
        wheres.append(where)
        rows.append(_read_document(row, file.parent, where) if "segments" in row else row)
    return _Table(rows, wheres, folder=file.parent)


def _read_document(raw: Row, folder: Path, where: str) -> Document:
    _check_keys(raw, ("segments",), f"{where}: document")
    if not isinstance(raw["segments"], list) or not raw["segments"]:
        raise ValueError(f"data: {where}: document has no segments")
    document = Document(
        [_read_segment(s, folder, f"{where}: segment {number}") for number, s in enumerate(raw["segments"])]
    )
    if not any(segment.target for segment in document):
        raise ValueError(f'data: {where}: document has no target; give a segment "target": true')
    return document


def _read_segment(raw: Any, folder: Path, where: str) -> Segment:
    if not isinstance(raw, dict):
        raise ValueError(f"data: {where}: expected a JSON object, got {type(raw).__name__}")
    _check_keys(raw, ("modality", "value", "ids", "target"), where)
    modality, value, ids, target = (raw.get(key) for key in ("modality", "value", "ids", "target"))
    if target not in (None, True, False) or (isinstance(target, int | float) and not isinstance(target, bool)):
        raise ValueError(f"data: {where}: target must be true or false, got {target!r}")
    if ids is not None and not (
        isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)  # True is an int, but no id
    ):
        raise ValueError(f"data: {where}: ids must be a list of whole numbers from 0")
    if modality != "text":
        value = _resolve(value, folder)
        _check_file(value, where)
    try:
        return Segment(modality, value=value, ids=ids, target=bool(target))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"data: {where}: {error}") from error


def _check_keys(raw: Row, known: Sequence[str], where: str) -> None:
    if unknown := sorted(set(raw) - set(known)):
        raise ValueError(f"data: {where}: unknown keys {unknown}; known are {list(known)}")


def _is_media(value: Any) -> bool:
    return isinstance(value, str) and Path(value).suffix.lower() in _MEDIA_SUFFIXES


def _resolve(value: Any, folder: Path) -> Any:
    return str(folder / value) if _is_media(value) else value


def _check_file(value: Any, where: str) -> None:
    if _is_media(value) and not Path(value).is_file():
        raise ValueError(f"data: {where}: file {value!r} does not exist")


# Python lists and Hugging Face datasets


def _list_table(rows: Sequence[Any], limit: int | None) -> _Table:
    rows = rows[:limit]
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping | Document):
            raise ValueError(f"data: row {number} must be a dict or a Document, got {type(row).__name__}")
    return _Table(rows, [f"row {number}" for number in range(len(rows))])


def _object_splits(source: Any) -> dict[str, _Loader]:
    if isinstance(source, dict):  # DatasetDict and IterableDatasetDict are dicts
        return {name: _object_loader(part) for name, part in source.items()}
    return {_WHOLE: _object_loader(source)}


def _object_loader(source: Any) -> _Loader:
    return lambda limit: _object_table(source, limit)


def _object_table(source: Any, limit: int | None) -> _Table:
    if isinstance(source, list | tuple | Rows):
        return _list_table(source, limit)
    import datasets  # two seconds, spared to those who read folders

    if not isinstance(source, datasets.Dataset | datasets.IterableDataset):
        kind = type(source).__name__
        raise ValueError(f"data: cannot read a {kind}; give a path, a list of dicts or a datasets.Dataset")
    for name, feature in (source.features or {}).items():
        if isinstance(feature, datasets.Audio | datasets.Image) and feature.decode:
            source = source.cast_column(name, type(feature)(decode=False))
    if isinstance(source, datasets.IterableDataset):
        if limit is None:
            raise ValueError("data: a streamed data set has no length; set limit to read its first rows")
        return _list_table(list(source.take(limit)), None)
    table = source if limit is None else source.select(range(min(limit, len(source))))
    return _Table(table, is_dataset=True)


def _disk_splits(folder: Path) -> dict[str, _Loader]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: {folder} is no whole data set of datasets' save_to_disk: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        return _object_splits(loaded)
    return {_canonical(folder.resolve().name, str(loaded.split or "train")): _object_loader(loaded)}


def _hub_splits(identity: str, config: str | None) -> dict[str, _Loader]:
    import datasets

    names = _from_hub(identity, lambda: datasets.get_dataset_split_names(identity, config))

    def loader(name: str) -> _Loader:
        def load(limit: int | None) -> _Table:
            loaded = _from_hub(identity, lambda: datasets.load_dataset(identity, config, split=name))
            return _object_table(loaded, limit)

        return load

    return {name: loader(name) for name in names}


def _from_hub(identity: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:  # network, authorisation, format: each library below has its own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]  # the rest tells of retries
        raise ValueError(f"data: no file or folder {identity!r} here, and not from the Hub: {reason}") from error


# Columns


def _choose_columns(table: _Table, columns: Mapping[str, str], source: Any) -> dict[str, str]:
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
        found = next((c for c in candidates if c in names and c not in chosen.values()), None)
        if modality not in chosen and found:
            chosen[modality] = found
    return chosen


def _column_names(table: _Table) -> list[str] | None:
    if table.is_dataset:
        return list(table.rows.column_names)  # type: ignore[attr-defined]
    first = next((row for row in table.rows if not isinstance(row, Document)), None)
    return None if first is None else list(first)


def _check_rows(rows: Rows, table: _Table) -> None:
    """Each row has a value in each chosen column, and the files that it names exist."""
    for number, raw in enumerate(table.rows):
        if isinstance(raw, Document):
            continue
        for modality, column in rows.columns.items():
            if raw.get(column) is None:
                raise ValueError(
                    f"data: {table.where[number]}: no value in column {column!r} for modality {modality!r}; "
                    f"the columns are {sorted(raw)}"
                )
            if table.folder and modality != "text":
                _check_file(_resolve(raw[column], table.folder), table.where[number])
