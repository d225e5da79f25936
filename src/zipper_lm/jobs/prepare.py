"""`zipper prepare`: every value of a fuse recipe's data through its codec once, in parallel, into shards of ids.

A shard is written whole or not at all, with a note beside it that says what is in it. A run that was cut off goes on
after the shards whose notes are there. What is written depends on the recipe and the codecs, not on the processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from rich.console import Console

from zipper_lm.codecs.codec import Codec, codec_hash
from zipper_lm.codecs.suffixes import is_media
from zipper_lm.data.broken import Broken
from zipper_lm.data.collation import Specials
from zipper_lm.data.document import Document
from zipper_lm.data.encoding import Item, encoded, encoded_modalities, items
from zipper_lm.data.prepared import (
    CLIPS,
    FORMAT,
    TRAIN,
    VALIDATION,
    document_schema,
    file_hash,
    pack_document,
    pack_row,
    row_schema,
)
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.data.sources.readers import PREPARED_FILE, Rows
from zipper_lm.data.sources.table import fingerprint_of, readable
from zipper_lm.data.tasks import parse_task
from zipper_lm.fusion.config import TowerSpec
from zipper_lm.jobs.recipes.checks import check_sources
from zipper_lm.jobs.recipes.reader import to_mapping
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.jobs.resume import beside, check_ours
from zipper_lm.jobs.rows import DataSource
from zipper_lm.models.assemble import codec_of
from zipper_lm.utils.files import as_json, check_output, new_file, new_folder, write_json
from zipper_lm.utils.interruption import Interrupted, end_with_parent, signal_of
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.places import place_of
from zipper_lm.utils.progress import bar, plain_console

SHARD_ROWS = 1000
SETTINGS_FILE = "settings.json"
_FREE = ("broken_limit", "fraction", "validation_limit", "streaming")
"""Fields of a data recipe that change no shard that is written: training heeds them, or the number of rows shows it."""


def prepare(
    recipe: FuseRecipe,
    output: str | Path,
    *,
    processes: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    shard_rows: int = SHARD_ROWS,
    console: Console | None = None,
) -> dict[str, Any]:
    """Encode the training and validation splits of a recipe, and its clips; `data.fraction` is left to the training.

    Args:
        recipe: its towers give the codecs, its data the rows, its tasks the modalities.
        output: folder for the shards (`zipper_lm.data.prepared`).
        processes: that encode; each has the codecs in memory.
        resume: go on after the whole shards of a run with the same settings that was cut off.
        overwrite: replace what is at `output`, and throw such a run away.
        shard_rows: rows of the source that one shard holds.
        console: where progress is told; `None` is standard error.

    Returns:
        What `prepared.json` says, and ``seconds``.

    Raises:
        ValueError: for an existing output, a tower without codec, data that cannot be read, more broken items than
            `data.broken_limit`, or other settings than those of the run to go on with.
        Interrupted: after Ctrl-C; the whole shards are kept.
    """
    started, data = time.time(), recipe.data
    for name, value in (("processes", processes), ("shard_rows", shard_rows)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_output(output, overwrite)
    check_sources(output, recipe)
    source = DataSource(data)
    if source.prepared is not None:
        raise ValueError(f"data.source: {data.source} is prepared already; give the raw data")
    named = {m for template in recipe.tasks for m in parse_task(template, list(recipe.towers)).modalities}
    codecs, lacking = recipe_codecs(recipe)
    if missing := sorted(named - set(codecs)):
        why = "; ".join(lacking[name] for name in missing)
        raise ValueError(f"towers: {missing} have no codec beside them ({why}); name one in towers.NAME.codec")
    splits: dict[str, Any] = {TRAIN: source.open(TRAIN)}
    if data.validation is not None:
        splits[VALIDATION] = source.validation_rows()
    broken = Broken(data.broken_limit)
    if data.clips is not None:
        splits[CLIPS] = source.clips(recipe.seed, broken)
    modalities = encoded_modalities(splits[TRAIN], named, list(codecs))
    settings = {
        "format": FORMAT,
        "data": {key: value for key, value in to_mapping(data).items() if key not in _FREE},
        "seed": recipe.seed,
        "modalities": modalities,
        "codecs": {name: _describe(codec) for name, codec in codecs.items()},
        "rows": {name: _identity(rows) for name, rows in splits.items()},
        "shard_rows": shard_rows,
    }
    working = beside(output, "preparing")
    _begin(working, settings, resume=resume, overwrite=overwrite)
    raw = {name: rows for name, rows in splits.items() if isinstance(rows, Rows)}
    job = _Job(recipe, modalities, raw, splits[TRAIN].columns, working)
    try:
        notes = _encode(job, splits, shard_rows, processes, broken, console)
        description = _finish(job, notes, settings, codecs, broken, output, overwrite)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"{working} keeps the whole shards; go on with resume (--resume)", signal_of(error)
        ) from error
    except BrokenProcessPool as error:
        raise ValueError(
            f"a process ended before its work was done (out of memory?); {working} keeps the whole shards: "
            "go on with resume (--resume), perhaps with fewer processes"
        ) from error
    shutil.rmtree(working, ignore_errors=True)
    return description | {"seconds": round(time.time() - started, 1)}


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


def _describe(codec: Codec) -> dict[str, Any]:
    return {
        "kind": codec.kind,
        "sha256": codec_hash(codec),
        "vocab_size": codec.vocab_size,
        "specials": [codec.bos_id, codec.eos_id, codec.pad_id],
        "rate": codec.rate,
    }


def _identity(rows: Any) -> list[Any] | None:
    """What differs if the rows are others than before: their number and a fingerprint. Of a stream nothing is known."""
    if not isinstance(rows, Sequence):
        return None
    return [len(rows), rows.fingerprint() if isinstance(rows, Rows) else fingerprint_of(rows)]


def _begin(working: Path, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """A working folder that knows its settings: a new one, or that of a run with the same ones."""
    file = working / SETTINGS_FILE
    if resume:
        if not file.is_file():
            raise ValueError(f"nothing to resume: there is no {working}")
        before, now = read_mapping(file), json.loads(json.dumps(settings))
        if changed := sorted(k for k in {*before, *now} if before.get(k) != now.get(k)):
            raise ValueError(
                f"cannot resume: {changed} changed since {working} was begun; put them back, or --overwrite"
            )
        return
    if file.is_file() and not overwrite:
        raise ValueError(f"{working} holds an interrupted run: resume it (--resume), or start anew (--overwrite)")
    check_ours(working, SETTINGS_FILE)
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    with new_file(file) as new:
        write_json(new, settings)


@dataclass(frozen=True)
class _Job:
    """What every process needs to know; raw rows that can be opened anywhere are not sent one by one."""

    recipe: FuseRecipe
    modalities: list[str]
    rows: dict[str, Rows]
    columns: dict[str, str]
    """Of the training split: modality name to the column its values come from."""
    working: Path


@dataclass(frozen=True)
class _Shard:
    split: str
    number: int
    source: range | list[Item]
    """Numbers of the job's rows, or the items themselves, where they come from a stream."""
    documents: bool

    @property
    def file(self) -> str:
        return f"{self.split}/{self.number:05d}.arrow"


class _Encoder:
    """Writes shards."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        ids_only = Specials(0, 0, 0)  # nothing is framed here: of a tower without codec, ids pass as they are
        codecs, lacking = recipe_codecs(job.recipe)
        self.processor = ZipperProcessor(codecs, dict.fromkeys(job.recipe.towers, ids_only), lacking)

    def write(self, shard: _Shard) -> dict[str, Any]:
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


_encoder: _Encoder | None = None  # of this process


def _start(job: _Job) -> None:
    global _encoder
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process; a shard is finished first
    torch.set_num_threads(1)
    _encoder = _Encoder(job)


def _write(shard: _Shard) -> dict[str, Any]:
    assert _encoder is not None
    return _encoder.write(shard)


def _encode(
    job: _Job, splits: Mapping[str, Any], shard_rows: int, processes: int, broken: Broken, console: Console | None
) -> dict[str, list[dict[str, Any]]]:
    """The notes of all shards of every split, in order."""
    notes: dict[str, list[dict[str, Any]]] = {name: [] for name in splits}
    lengths = [len(rows) if isinstance(rows, Sequence) else None for rows in splits.values()]
    total = None if None in lengths else sum(n for n in lengths if n)
    shards = chain.from_iterable(_shards(name, rows, shard_rows) for name, rows in splits.items())
    done, told = 0, console or plain_console(stderr=True)
    with bar(told, "encoding", transient=True) as advance, closing(_written(job, shards, processes)) as written:
        advance(0, total)
        for note in written:
            notes[Path(note["file"]).parts[0]].append(note)
            broken.extend(note["broken"])
            done += note["rows"] + len(note["broken"])
            advance(done, total)
    return notes


def _shards(split: str, rows: Any, shard_rows: int) -> Iterator[_Shard]:
    documents = isinstance(next(readable(rows), None), Document)
    if isinstance(rows, Rows):
        for number, start in enumerate(range(0, len(rows), shard_rows)):
            yield _Shard(split, number, range(start, min(start + shard_rows, len(rows))), documents)
        return
    found, number = items(rows, Broken()), 0
    while chunk := list(islice(found, shard_rows)):
        yield _Shard(split, number, chunk, documents)
        number += 1


def _written(job: _Job, shards: Iterator[_Shard], processes: int) -> Generator[dict[str, Any], None, None]:
    """The note of each shard, in order: of an earlier run, or written now."""
    if processes == 1:
        encoder = _Encoder(job)
        for shard in shards:
            yield _note(job, shard) or encoder.write(shard)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (job,))
    waiting: deque[dict[str, Any] | Future[dict[str, Any]]] = deque()
    try:
        for shard in shards:
            waiting.append(_note(job, shard) or pool.submit(_write, shard))
            if len(waiting) >= 2 * processes:  # no more of a stream in memory than that
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(note: dict[str, Any] | Future[dict[str, Any]]) -> dict[str, Any]:
    return note.result() if isinstance(note, Future) else note


def _note(job: _Job, shard: _Shard) -> dict[str, Any] | None:
    """What an earlier run noted of a shard, if that is whole."""
    file = job.working / shard.file
    note = file.with_suffix(".json")
    if not (file.is_file() and note.is_file()):
        return None
    noted = read_mapping(note)
    return noted if noted.get("bytes") == file.stat().st_size else None


def _finish(
    job: _Job,
    notes: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, Any],
    codecs: Mapping[str, Codec],
    broken: Broken,
    output: str | Path,
    overwrite: bool,
) -> dict[str, Any]:
    """The output, from the shards of the working folder, which stay there too; returns what `prepared.json` says.

    Raises:
        ValueError: if a split has no rows, or as `new_folder`.
    """
    data = job.recipe.data
    summaries = {name: _summary(each, codecs) for name, each in notes.items()}
    for name, summary in summaries.items():
        if not summary["rows"]:
            raise ValueError(f"data: nothing of split {name!r} could be encoded; {broken.told()}")
    if data.clips is not None:
        summaries[CLIPS]["made_with"] = {**asdict(data.clips), "seed": job.recipe.seed}
    description = {key: value for key, value in settings.items() if key not in ("rows", "shard_rows")}
    description |= {"zipper_lm": version("zipper-lm"), "splits": summaries, "broken": len(broken.items)}
    description["data"] = _with_places(to_mapping(data))
    description["columns"] = job.columns
    with new_folder(output, overwrite) as folder:
        for name, summary in summaries.items():
            (folder / name).mkdir()
            for shard in summary["shards"]:
                _link(job.working / shard["file"], folder / shard["file"])
        if broken.items:
            lines = "".join(as_json(item) + "\n" for item in broken.items)
            (folder / "broken.jsonl").write_text(lines, encoding="utf-8")
        write_json(folder / PREPARED_FILE, description)
    return description


def _with_places(data: dict[str, Any]) -> dict[str, Any]:
    """A data recipe that means the same from any working directory."""
    clips = data["clips"] and data["clips"] | {"source": place_of(data["clips"]["source"])}
    return data | {"source": place_of(data["source"]), "clips": clips}


def _link(file: Path, goal: Path) -> None:
    """One file under a second name: no space is needed, and either name may go. Copied where links cannot be."""
    try:
        os.link(file, goal)
    except OSError:
        shutil.copyfile(file, goal)


def _summary(notes: Sequence[Mapping[str, Any]], codecs: Mapping[str, Codec]) -> dict[str, Any]:
    """Counts of a split, and its shards."""
    tokens: dict[str, int] = {}
    for note in notes:
        for name, count in note["tokens"].items():
            tokens[name] = tokens.get(name, 0) + count
    rates = {name: codecs[name].rate for name in tokens if name in codecs}
    return {
        "rows": sum(note["rows"] for note in notes),
        "tokens": tokens,
        "seconds": {name: round(tokens[name] / rate, 1) for name, rate in rates.items() if rate},
        "shards": [{key: note[key] for key in ("file", "rows", "bytes", "sha256")} for note in notes],
    }
