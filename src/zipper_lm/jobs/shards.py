"""A shard of prepared data: what it is made of, and how it is encoded and written, whoever does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from zipper_lm.codecs.codec import Codec
from zipper_lm.codecs.suffixes import is_media
from zipper_lm.data.broken import Broken
from zipper_lm.data.collation import Specials
from zipper_lm.data.document import Document
from zipper_lm.data.encoding import Item, encoded, items
from zipper_lm.data.prepared import document_schema, file_hash, pack_document, pack_row, row_schema
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.data.sources.readers import Rows
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.models.assemble import codec_of
from zipper_lm.utils.files import new_file, write_json
from zipper_lm.utils.json_files import read_mapping


@dataclass(frozen=True)
class Job:
    """What every process needs to know; raw rows that can be opened anywhere are not sent one by one."""

    recipe: FuseRecipe
    modalities: list[str]
    rows: dict[str, Rows]
    columns: dict[str, str]
    """Of the training split: modality name to the column its values come from."""
    working: Path

    def note(self, shard: Shard) -> dict[str, Any] | None:
        """What an earlier run noted of a shard, if that is whole."""
        file = self.working / shard.file
        note = file.with_suffix(".json")
        if not (file.is_file() and note.is_file()):
            return None
        noted = read_mapping(note)
        return noted if noted.get("bytes") == file.stat().st_size else None


@dataclass(frozen=True)
class Shard:
    split: str
    number: int
    source: range | list[Item]
    """Numbers of the job's rows, or the items themselves, where they come from a stream."""
    documents: bool

    @property
    def file(self) -> str:
        return f"{self.split}/{self.number:05d}.arrow"


class Encoder:
    """Writes shards."""

    def __init__(self, job: Job) -> None:
        self.job = job
        ids_only = Specials(0, 0, 0)  # nothing is framed here: of a tower without codec, ids pass as they are
        codecs, lacking = recipe_codecs(job.recipe)
        self.processor = ZipperProcessor(codecs, dict.fromkeys(job.recipe.towers, ids_only), lacking)

    def write(self, shard: Shard) -> dict[str, Any]:
        """Encode and write a shard and its note; returns the note."""
        broken = Broken(self.job.recipe.data.broken_limit)
        found: Any = shard.source
        if isinstance(shard.source, range):
            found = items(self.job.rows[shard.split], broken, shard.source)
        rows, tokens = [], dict.fromkeys(self.job.modalities, 0)
        for item, row in encoded(self.processor, found, self.job.modalities, broken):
            if isinstance(row, Document) != shard.documents:
                raise ValueError(f"data {item.where}: a split holds either rows or whole documents, not both")
            rows.append(pack_document(row, item.where) if shard.documents else self._packed(item, row))
            for segment in row if isinstance(row, Document) else row.values():
                tokens[segment.modality] = tokens.get(segment.modality, 0) + len(segment.ids or [])
        schema = document_schema() if shard.documents else row_schema(self.job.modalities)
        file = self.job.working / shard.file
        with new_file(file, overwrite=True) as new, pa.ipc.new_file(str(new), schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema))
        note = {"file": shard.file, "rows": len(rows), "bytes": file.stat().st_size, "sha256": file_hash(file)}
        note |= {"tokens": tokens, "broken": broken.items}
        with new_file(file.with_suffix(".json"), overwrite=True) as new:
            write_json(new, note)
        return note

    def _packed(self, item: Item, row: Mapping[str, Any]) -> dict[str, Any]:
        labels = {
            column: str(value)
            for column, value in item.row.items()
            if column not in row and isinstance(value, str | int | float) and not is_media(value)
        }
        return pack_row(row, item.where, labels)


def recipe_codecs(recipe: FuseRecipe) -> tuple[dict[str, Codec], dict[str, str]]:
    """The codecs of a recipe's towers, without the towers; and why the others have none.

    Raises:
        ValueError: if a tower is not made yet, or a codec cannot be loaded.
    """
    codecs, lacking = {}, {}
    for name, tower in recipe.towers.items():
        if tower.pretrain is not None and not Path(tower.source).is_dir():
            raise ValueError(
                f"towers.{name}: {tower.source} is not made yet; `zipper pretrain` or `zipper fuse` makes it"
            )
        spec = TowerSpec(source=tower.source, revision=tower.revision, trust_remote_code=tower.trust_remote_code)
        codec, why_none = codec_of(spec, tower.codec.make() if tower.codec is not None else None)
        if codec is not None:
            codecs[name] = codec
        else:
            lacking[name] = why_none
    return codecs, lacking
