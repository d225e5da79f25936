"""Local folders: `audiofolder` and `imagefolder`, with metadata or by class, JSONL files, tars, `save_to_disk`.

Folders in the form of the `audiofolder` loader (https://huggingface.co/docs/datasets/audio_dataset) are read
directly, not through `datasets`, whose loader needs torchcodec even to keep audio undecoded, copies the data
into a cache, and guesses types (a transcription "007" would become the number 7).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from zipper_lm.codecs.suffixes import IMAGE_SUFFIXES, is_media
from zipper_lm.data.sources.jsonl import json_lines, jsonl_loader
from zipper_lm.data.sources.objects import disk_splits
from zipper_lm.data.sources.table import Loader, Places, Row, Table, usual_name
from zipper_lm.data.sources.tars import tar_loader, tar_splits
from zipper_lm.utils.places import inside

_METADATA = ("metadata.csv", "metadata.jsonl")


def folder_splits(folder: Path) -> dict[str, Loader]:
    """The splits of a local folder, whatever it holds."""
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return disk_splits(folder)
    if metadata := _metadata_of(folder):
        return _metadata_splits(metadata)
    if shards := sorted(folder.glob("*.tar")):
        return tar_splits(shards)
    found: dict[str, Loader] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and (metadata := _metadata_of(entry)):
            found[entry.name] = _metadata_loader(metadata, "")
        elif entry.is_dir() and (shards := sorted(entry.glob("*.tar"))):
            found[entry.name] = tar_loader(shards)
        elif entry.suffix == ".jsonl" and usual_name(entry.stem, ""):
            found[entry.stem] = jsonl_loader(entry)
    found = dict(sorted((_file_splits(folder, set(found)) | found).items()))
    if not found:
        raise ValueError(
            f"data: {folder} has no metadata.csv or metadata.jsonl (nor have its sub-folders), no JSONL file named "
            "after a split, no tar, no sounds or pictures, in sub-folders or not, and was not written by datasets' "
            "save_to_disk"
        )
    return found


def _file_splits(folder: Path, others: set[str]) -> dict[str, Loader]:
    """Files without metadata, in sub-folders named after splits or not. A sub-folder of a split is what its files show,
    which is their text: ``train/cat/1.png``, or ``cat/1.png``; without any, nothing is known of them: ``train/1.wav``.

    Args:
        folder: where. others: names of splits that are there in another form.
    """
    splits = {entry.name: entry for entry in sorted(folder.iterdir()) if usual_name(entry.name, "") and entry.is_dir()}
    if not splits and not others:
        splits = {usual_name(folder.resolve().name, "train"): folder}
    known = {usual_name(name, name) for name in others}  # train.jsonl beside train/, which holds its files
    splits = {name: top for name, top in splits.items() if usual_name(name, name) not in known}
    found = {name: (_media(top, "*"), _media(top, "*/*")) for name, top in splits.items()}
    for name, (alone, shown) in found.items():
        if deeper := _media(splits[name], "*/*/**/*"):
            raise ValueError(
                f"data: {splits[name]} has sounds or pictures in sub-folders of sub-folders, such as {deeper[0]}, "
                "where none are looked for; move them up, or write metadata"
            )
        if alone and shown:
            raise ValueError(
                f"data: {splits[name]} has {len(alone)} sounds or pictures of its own and {len(shown)} in sub-folders, "
                "whose names would be their text; keep one kind"
            )
    return {
        name: _file_loader(alone or shown, splits[name]) for name, (alone, shown) in found.items() if alone or shown
    }


def _media(top: Path, pattern: str) -> list[Path]:
    """Sounds and pictures, and links to such; nothing that is hidden."""
    found = [f for f in sorted(top.glob(pattern)) if is_media(f.name) and not f.is_dir()]
    found = [f for f in found if not any(part.startswith(".") for part in f.relative_to(top).parts)]
    if len(kinds := {_kind_of(f): f.name for f in found}) > 1:
        raise ValueError(
            f"data: {top} has sounds and pictures, such as {sorted(kinds.values())}; keep one kind, or write metadata"
        )
    return found


def _file_loader(files: Sequence[Path], top: Path) -> Loader:
    def load(limit: int | None) -> Table:
        chosen, rows = files[:limit], list[Row]()
        for file in chosen:
            shows = {} if file.parent == top else {"text": file.parent.name}
            rows.append({_kind_of(file): str(file), **shows, "file_name": str(file)})
        missing = [f"link to a file that does not exist: {f}" for f in chosen if not f.is_file()]
        return Table(rows, [str(f) for f in chosen], problems=missing)

    return load


def _kind_of(file: Path) -> str:
    return "image" if file.suffix.lower() in IMAGE_SUFFIXES else "audio"


def _metadata_of(folder: Path) -> Path | None:
    files = [folder / name for name in _METADATA if (folder / name).is_file()]
    if len(files) > 1:
        raise ValueError(f"data: {folder} has both metadata.csv and metadata.jsonl; keep one")
    return files[0] if files else None


def _metadata_splits(metadata: Path) -> dict[str, Loader]:
    """One metadata file: flat, or with all its files in sub-folders named after splits."""
    tops = {Path(_file_name(where, row)).parts[0] for where, row in _metadata_lines(metadata)}
    splits = {top for top in tops if usual_name(top, "") and (metadata.parent / top).is_dir()}
    if splits and splits < tops:
        raise ValueError(
            f"data: {metadata} names files in {sorted(splits)}, which are splits, and in {sorted(tops - splits)}, "
            "which are none: the rows of a test split would be trained on; keep one kind, or write one per split"
        )
    if splits:
        return {top: _metadata_loader(metadata, top) for top in sorted(tops)}
    return {usual_name(metadata.parent.resolve().name, "train"): _metadata_loader(metadata, "")}


def _metadata_loader(metadata: Path, top: str) -> Loader:
    return lambda limit: _read_metadata(metadata, top, limit)


def _read_metadata(metadata: Path, top: str, limit: int | None) -> Table:
    lines = (
        (where, row)
        for where, row in _metadata_lines(metadata)
        if not top or Path(_file_name(where, row)).parts[0] == top
    )
    wheres, rows, missing = [], [], []
    for where, row in islice(lines, limit):
        name = _file_name(where, row)
        path = inside(metadata.parent, name, f"data: {where}: file_name")
        if not path.is_file():
            missing.append(f"{where}: file {str(path)!r} does not exist")
        wheres.append(where)
        rows.append({_kind_of(path): name} | row)
    return Table(rows, wheres, files=Places((metadata.parent,)), problems=missing)


def _file_name(where: str, row: Row) -> str:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"data: {where}: no file_name; the columns are {sorted(row)}")
    return name


def _metadata_lines(metadata: Path) -> Iterator[tuple[str, Row]]:
    return _csv_lines(metadata) if metadata.suffix == ".csv" else json_lines(metadata)


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
