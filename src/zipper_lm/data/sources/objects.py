"""Python lists and Hugging Face `datasets`: given, written to disk, or on the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from zipper_lm.data.document import Document
from zipper_lm.data.sources.table import ANYWHERE, WHOLE, Loader, Places, Table, usual_name
from zipper_lm.utils.hub import reaching


def _list_table(rows: Sequence[Any], limit: int | None) -> Table:
    rows = rows[:limit]
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping | Document):
            raise ValueError(f"data: row {number} must be a dict or a Document, got {type(row).__name__}")
    return Table(rows, [f"row {number}" for number in range(len(rows))])


def object_splits(source: Any, streaming: bool = False, files: Places = ANYWHERE) -> dict[str, Loader]:
    """The splits of a list, a `Dataset` or a `DatasetDict`."""
    if isinstance(source, dict):  # DatasetDict and IterableDatasetDict are dicts
        return {name: _object_loader(part, streaming, files) for name, part in source.items()}
    return {WHOLE: _object_loader(source, streaming, files)}


def _object_loader(source: Any, streaming: bool = False, files: Places = ANYWHERE) -> Loader:
    return lambda limit: replace(_object_table(source, limit, streaming), files=files)


def _object_table(source: Any, limit: int | None, streaming: bool) -> Table:
    if isinstance(source, Sequence):
        return _list_table(source, limit)
    import datasets  # two seconds, spared to those who read folders

    if not isinstance(source, datasets.Dataset | datasets.IterableDataset):
        kind = type(source).__name__
        raise ValueError(f"data: cannot read a {kind}; give a path, a list of dicts or a datasets.Dataset")
    source = _plain(source)
    labels: dict[str, Sequence[str]] = {}
    for name, feature in (source.features or {}).items():
        if isinstance(feature, datasets.Audio | datasets.Image) and feature.decode:
            source = source.cast_column(name, type(feature)(decode=False))
        elif isinstance(feature, datasets.ClassLabel):
            labels[name] = feature.names
    if isinstance(source, datasets.Dataset):
        table = source if limit is None else source.select(range(min(limit, len(source))))
        return Table(table, columns=table.column_names, labels=labels, fingerprint=table._fingerprint)
    if streaming:
        stream = source if limit is None else source.take(limit)
        return Table(stream, columns=stream.column_names or list(next(iter(stream), {})), labels=labels)
    if limit is None:
        raise ValueError("data: a streamed data set has no length; set limit to read its first rows")
    rows = list(source.take(limit))
    return Table(rows, [f"row {number}" for number in range(len(rows))], labels=labels)


def _plain(source: Any) -> Any:
    """The data set with rows of plain Python. One that was made for torch, numpy, pandas or arrow gives tensors, series
    or tables, in which no class has a name; the format is saved with it.

    Raises:
        ValueError: if a function makes its rows on the way, which may make anything of a column.
    """
    import datasets

    if isinstance(source, datasets.IterableDataset):
        return source.with_format(None)
    if source.format["type"] == "custom":
        raise ValueError("data: the data set has a transform (with_transform); apply it first, with map")
    if source.format["type"] is None and source.format["columns"] == source.column_names:
        return source  # with its fingerprint, which `with_format` changes
    return source.with_format(None)


def disk_splits(folder: Path) -> dict[str, Loader]:
    """The splits of what ``save_to_disk`` wrote."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: {folder} is no whole data set of datasets' save_to_disk: {error}") from error
    files = Places((folder,))
    if isinstance(loaded, datasets.DatasetDict):
        return object_splits(loaded, files=files)
    return {usual_name(folder.resolve().name, str(loaded.split or "train")): _object_loader(loaded, files=files)}


def hub_splits(identity: str, config: str | None, revision: str | None, streaming: bool) -> dict[str, Loader]:
    """The splits of a data set on the Hub; a split is fetched when it is read, a stream's rows one after the other."""
    import datasets

    with reaching("data", identity, revision):
        names = datasets.get_dataset_split_names(identity, config, revision=revision)

    def loader(name: str) -> Loader:
        def load(limit: int | None) -> Table:
            with reaching("data", identity, revision):
                loaded = datasets.load_dataset(identity, config, split=name, revision=revision, streaming=streaming)
                table = replace(_object_table(loaded, limit, streaming), files=_of_hub())
            return replace(table, rows=_Reached(table.rows, identity, revision)) if streaming else table

        return load

    return {name: loader(name) for name in names}


def _of_hub() -> Places:
    """Where `datasets` puts what it fetches: a row may name no other file of this machine."""
    import datasets

    known = datasets.config
    here = known.HF_DATASETS_CACHE, known.DOWNLOADED_DATASETS_PATH, known.EXTRACTED_DATASETS_PATH, HF_HUB_CACHE
    return Places([Path(place) for place in here])


class _Reached:
    """A stream whose failures on the way name the data set."""

    def __init__(self, rows: Any, identity: str, revision: str | None) -> None:
        self._rows, self._identity, self._revision = rows, identity, revision

    def state_dict(self) -> Any:
        return self._rows.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._rows.load_state_dict(state)

    def __iter__(self) -> Iterator[Any]:
        with reaching("data", self._identity, self._revision):
            yield from self._rows
