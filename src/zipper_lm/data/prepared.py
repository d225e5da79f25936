"""What `zipper prepare` wrote: ids in Arrow files that are mapped into memory, and what they were made with.

    DIR/train/00000.arrow ...       rows or whole documents with their ids
    DIR/validation/00000.arrow ...  if the recipe has a validation split
    DIR/clips/00000.arrow ...       if it has clips
    DIR/prepared.json               written last: codecs by hash, shards by hash, counts
    DIR/broken.jsonl                what was left out and why, if anything was

Rows have the columns ``<modality>_ids`` (list of int32) and ``<modality>_length`` of every modality, ``text`` (if that
is one), ``source`` (where the row is from) and ``labels`` (map of string to string: the other plain columns). Documents
have ``segments`` (list of modality, ids, text, target) and ``source``. Arrow and not Parquet: a mapped Arrow file costs
no memory and gives any row at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from zipper_lm.codecs.codec import Codec, codec_hash
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.sources.readers import PREPARED_FILE, check_excluded
from zipper_lm.data.token_ids import TokenIds
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.places import inside

FORMAT = 1
TRAIN, VALIDATION, CLIPS = "train", "validation", "clips"
_SEGMENTS = pa.list_(
    pa.struct([("modality", pa.string()), ("ids", pa.list_(pa.int32())), ("text", pa.string()), ("target", pa.bool_())])
)


def is_prepared(source: Any) -> bool:
    """Whether a data source is a folder of `zipper prepare`."""
    return isinstance(source, str | Path) and (Path(source).expanduser() / PREPARED_FILE).is_file()


def row_schema(modalities: Sequence[str]) -> pa.Schema:
    """Columns of rows with these modalities."""
    fields = [(f"{m}_ids", pa.list_(pa.int32())) for m in modalities]
    fields += [(f"{m}_length", pa.int32()) for m in modalities]
    fields += [("text", pa.string())] if "text" in modalities else []
    return pa.schema([*fields, ("source", pa.string()), ("labels", pa.map_(pa.string(), pa.string()))])


def document_schema() -> pa.Schema:
    """Columns of whole documents."""
    return pa.schema([("segments", _SEGMENTS), ("source", pa.string())])


def pack_row(row: Mapping[str, Segment], source: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """An encoded row in the columns of `row_schema`."""
    packed: dict[str, Any] = {"source": source, "labels": list(labels.items())}
    for modality, segment in row.items():
        packed |= {f"{modality}_ids": segment.ids, f"{modality}_length": len(segment.ids or [])}
    if "text" in row:
        packed["text"] = row["text"].value
    return packed


def pack_document(document: Document, source: str) -> dict[str, Any]:
    """An encoded document in the columns of `document_schema`."""
    segments = [{"modality": s.modality, "ids": s.ids, "text": s.value, "target": s.target} for s in document]
    return {"segments": segments, "source": source}


class PreparedRows(Sequence[Any]):
    """Encoded rows (modality to `Segment` with ids) or documents, read from mapped files when they are asked for."""

    def __init__(
        self,
        table: pa.Table,
        modalities: Sequence[str],
        numbers: range | np.ndarray | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self._table = table
        self._modalities = modalities
        self._columns = columns or {}
        self._numbers = range(table.num_rows) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> PreparedRows: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return PreparedRows(self._table, self._modalities, self._numbers[index], self._columns)
        number = int(self._numbers[index])
        if self.whole:
            raw = self._table["segments"][number].as_py()
            return Document([Segment(s["modality"], s["text"], s["ids"], target=s["target"]) for s in raw])
        ids = {m: TokenIds(self._table[f"{m}_ids"][number].values.to_numpy()) for m in self._modalities}
        text = self._table["text"][number].as_py() if "text" in ids else None
        return {m: Segment(m, text if m == "text" else None, row) for m, row in ids.items()}

    @property
    def whole(self) -> bool:
        """Whether they are whole documents."""
        return "segments" in self._table.column_names

    def counts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Tokens and segments of every row or document by modality, int64 [rows] each, without reading the ids."""
        numbers = np.asarray(self._numbers, dtype=np.int64)
        if self.whole:
            parts = [_counted(chunk) for chunk in self._table["segments"].chunks]
            none = [np.zeros((2, len(chunk)), np.int64) for chunk in self._table["segments"].chunks]
            names = {name: None for part in parts for name in part}
            found = {n: np.concatenate([p.get(n, zero) for p, zero in zip(parts, none)], axis=1) for n in names}
            return {n: (tokens[numbers], segments[numbers]) for n, (tokens, segments) in found.items()}
        tokens = {m: self._table[f"{m}_length"].to_numpy()[numbers].astype(np.int64) for m in self._modalities}
        return {m: (each, np.ones_like(each)) for m, each in tokens.items()}

    def select(self, numbers: Sequence[int] | np.ndarray) -> PreparedRows:
        """The rows of these numbers, in this order."""
        chosen = np.asarray(self._numbers, np.int64)[np.asarray(numbers, np.int64)]
        return PreparedRows(self._table, self._modalities, chosen, self._columns)

    def without(self, exclude: Mapping[str, Sequence[str]]) -> PreparedRows:
        """All rows but those with one of the values in a label or in their text; whole documents stay.

        Raises:
            ValueError: if no such column was kept.
        """
        if self.whole:
            return self
        known: set[str] = set()
        kept = np.zeros(len(self), bool)
        for number in range(len(self)):
            label = self._labels(int(self._numbers[number]))
            known.update(label)
            kept[number] = all(label.get(c) not in values for c, values in exclude.items())
        check_excluded(exclude, known)
        return self.select(np.flatnonzero(kept))

    def _labels(self, number: int) -> dict[str, str]:
        """The plain columns of a row, and its text under both names."""
        label = dict(self._table["labels"][number].as_py())
        if "text" in self._modalities:
            label["text"] = label[self._columns.get("text", "text")] = self._table["text"][number].as_py()
        return label


def _counted(documents: pa.ListArray) -> dict[str, np.ndarray]:
    """Tokens and segments by modality, int64 [2, documents] each."""
    segments = documents.flatten()
    owner = np.repeat(np.arange(len(documents)), pc.list_value_length(documents).to_numpy())
    names = pc.struct_field(segments, "modality").to_numpy(zero_copy_only=False)
    tokens = pc.fill_null(pc.list_value_length(pc.struct_field(segments, "ids")), 0).to_numpy()
    found = {}
    for modality in dict.fromkeys(names.tolist()):
        mine = names == modality
        sums = np.bincount(owner[mine], tokens[mine], len(documents)).astype(np.int64)
        found[modality] = np.stack([sums, np.bincount(owner[mine], minlength=len(documents))])
    return found


class Prepared:
    """A folder of prepared data.

    Args:
        folder: where it is. description: what its `prepared.json` says.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        self.folder = folder
        self.description = description

    def rows(self, split: str) -> PreparedRows:
        """A split, after its shards have been compared with their hashes.

        Raises:
            ValueError: if there is no such split (naming those there), or a shard is missing, cut off or changed.
        """
        splits = self.description["splits"]
        if split not in splits:
            raise ValueError(f"data: {self.folder} has no prepared split {split!r}; it has {sorted(splits)}")
        tables = [self._table(shard) for shard in splits[split]["shards"]]
        if len({table.schema for table in tables}) != 1:
            raise ValueError(f"data: {self.folder}: the shards of split {split!r} are none, or rows and documents")
        columns = self.description.get("columns")
        return PreparedRows(pa.concat_tables(tables), self.description["modalities"], columns=columns)

    def clips(self, wanted: Mapping[str, Any], seed: int, exclude: Mapping[str, Sequence[str]]) -> PreparedRows:
        """The recombined clips, if they are those that a recipe wants, of recordings without what it excludes.

        Args:
            wanted: the fields of the recipe's `data.clips`, as `prepared.json` holds them. seed: of the draw.
            exclude: the recipe's `data.exclude`.

        Raises:
            ValueError: if they are others, or none were prepared; and as `rows`.
        """
        made = self.description["splits"].get(CLIPS, {}).get("made_with")
        made = made and {**made, "exclude": self.description["data"]["exclude"]}
        asked = {**wanted, "seed": seed, "exclude": dict(exclude)}
        if made != asked:
            raise ValueError(
                f"data.clips: {self.folder} has {made or 'none'}, the recipe wants {asked}; prepare it anew"
            )
        return self.rows(CLIPS)

    def check_modalities(self, wanted: Iterable[str]) -> None:
        """Raise `ValueError` if a modality that is wanted was not prepared."""
        if missing := sorted(set(wanted) - set(self.description["modalities"])):
            raise ValueError(
                f"data: {self.folder} was prepared with {self.description['modalities']}, without {missing}; "
                "prepare it anew with these tasks"
            )

    def check_codecs(self, codecs: Mapping[str, Codec]) -> None:
        """Raise `ValueError`, naming the codec, if one is not that which the ids were made with."""
        for modality, made_with in self.description["codecs"].items():
            codec = codecs.get(modality)
            if codec is not None and (found := codec_hash(codec)) != made_with["sha256"]:
                raise ValueError(
                    f"data: {self.folder} was prepared with another codec of {modality!r}: a {made_with['kind']} codec "
                    f"with sha256 {made_with['sha256'][:12]}, the model's is a {codec.kind} codec with {found[:12]}; "
                    "its ids would mean something else; prepare the data anew"
                )

    def _table(self, shard: Mapping[str, Any]) -> pa.Table:
        file = inside(self.folder, shard["file"], f"data: {self.folder / PREPARED_FILE}: shard")
        if not file.is_file():
            raise ValueError(f"data: shard {file} is missing")
        if (size := file.stat().st_size) != shard["bytes"]:
            raise ValueError(f"data: shard {file} has {size} bytes, it was written with {shard['bytes']}: cut off?")
        if file_hash(file) != shard["sha256"]:
            raise ValueError(f"data: shard {file} is not what was written (its sha256 differs)")
        try:
            table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
            table.validate(full=True)  # whoever changed the bytes can have changed their hash, too
        except Exception as error:  # also of names that are no UTF-8
            raise ValueError(f"data: shard {file}: no readable Arrow file: {_first_line(error)}") from error
        modalities = self.description["modalities"]
        if not any(table.schema.equals(schema) for schema in (row_schema(modalities), document_schema())):
            raise ValueError(f"data: shard {file} has other columns than rows of {modalities} or documents have")
        return table


def open_prepared(source: str | Path) -> Prepared:
    """The prepared data in a folder.

    Raises:
        ValueError: if there is none, or it is of another format.
    """
    folder = Path(source).expanduser()
    file = folder / PREPARED_FILE
    if not file.is_file():
        raise ValueError(f"data: no {PREPARED_FILE} in {source}")
    description = read_mapping(file)
    if description.get("format") != FORMAT:
        raise ValueError(f"data: {file} is of format {description.get('format')!r}, this version reads {FORMAT}")
    _check_described(description, file)
    return Prepared(folder, description)


_TYPES: dict[str, type] = {"modalities": list, "codecs": dict, "splits": dict, "data": dict}
_OF_CODEC = {"kind": str, "sha256": str}
_OF_SHARD = {"file": str, "bytes": int, "sha256": str}


def _check_described(description: Mapping[str, Any], file: Path) -> None:
    """Raise `ValueError`, naming the file and the place, unless a `prepared.json` says all that is asked of it here."""
    _check_fields(description, _TYPES, f"data: {file}")
    if not all(isinstance(modality, str) for modality in description["modalities"]):
        raise ValueError(f"data: {file}: modalities must be names, got {description['modalities']!r:.80}")
    columns = description.get("columns")
    if columns is not None:
        kept = isinstance(columns, dict) and all(isinstance(column, str) for column in columns.values())
        if not kept:
            raise ValueError(f"data: {file}: columns must be a mapping to names, got {columns!r:.80}")
    for name, codec in description["codecs"].items():
        _check_fields(codec, _OF_CODEC, f"data: {file}: codecs.{name}")
    for name, split in description["splits"].items():
        _check_fields(split, {"shards": list}, f"data: {file}: splits.{name}")
        for number, shard in enumerate(split["shards"]):
            _check_fields(shard, _OF_SHARD, f"data: {file}: splits.{name}.shards[{number}]")


def _check_fields(value: Any, types: Mapping[str, type], where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a mapping, got {value!r:.80}")
    for name, kind in types.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f"{where}.{name} must be a {kind.__name__}, got {value.get(name)!r:.80}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def file_hash(file: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
