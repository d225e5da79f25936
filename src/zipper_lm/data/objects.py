"""Python lists and Hugging Face `datasets`: given, written to disk, or on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zipper_lm.data.table import WHOLE, Loader, Table, usual_name
from zipper_lm.document import Document


def _list_table(rows: Sequence[Any], limit: int | None) -> Table:
    rows = rows[:limit]
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping | Document):
            raise ValueError(f"data: row {number} must be a dict or a Document, got {type(row).__name__}")
    return Table(rows, [f"row {number}" for number in range(len(rows))])


def object_splits(source: Any) -> dict[str, Loader]:
    """The splits of a list, a `Dataset` or a `DatasetDict`."""
    if isinstance(source, dict):  # DatasetDict and IterableDatasetDict are dicts
        return {name: _object_loader(part) for name, part in source.items()}
    return {WHOLE: _object_loader(source)}


def _object_loader(source: Any) -> Loader:
    return lambda limit: _object_table(source, limit)


def _object_table(source: Any, limit: int | None) -> Table:
    if isinstance(source, Sequence):
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
    return Table(table, is_dataset=True)


def disk_splits(folder: Path) -> dict[str, Loader]:
    """The splits of what ``save_to_disk`` wrote."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: {folder} is no whole data set of datasets' save_to_disk: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        return object_splits(loaded)
    return {usual_name(folder.resolve().name, str(loaded.split or "train")): _object_loader(loaded)}


def hub_splits(identity: str, config: str | None) -> dict[str, Loader]:
    """The splits of a data set on the Hub; a split is fetched when it is read."""
    import datasets

    names = _from_hub(identity, lambda: datasets.get_dataset_split_names(identity, config))

    def loader(name: str) -> Loader:
        def load(limit: int | None) -> Table:
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
