"""`zipper prepare`: every value of a fuse recipe's data through its codec once, in parallel, into shards of ids.

A shard is written whole or not at all, with a note beside it that says what is in it. A run that was cut off goes on
after the shards whose notes are there. What is written depends on the recipe and the codecs, not on the processes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from zipper_lm.codecs.codec import Codec, codec_hash
from zipper_lm.data.broken import Broken
from zipper_lm.data.document import Document
from zipper_lm.data.encoding import encoded_modalities, items
from zipper_lm.data.prepared import (
    CLIPS,
    FORMAT,
    TRAIN,
    VALIDATION,
)
from zipper_lm.data.sources.readers import PREPARED_FILE, Rows
from zipper_lm.data.sources.table import readable
from zipper_lm.data.tasks import parse_task
from zipper_lm.jobs.agreement import check_codecs
from zipper_lm.jobs.local_engine import by_processes
from zipper_lm.jobs.ray_engine import by_cluster, check_ray
from zipper_lm.jobs.recipes.checks import check_sources
from zipper_lm.jobs.recipes.reader import to_mapping
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.jobs.resume import check_ours, clear_done
from zipper_lm.jobs.rows import DataSource, identity_of
from zipper_lm.jobs.shards import Encoder, Job, Shard, recipe_codecs
from zipper_lm.jobs.start import check_kind, with_towers
from zipper_lm.utils.files import as_json, check_output, new_folder, remove_folder, write_json
from zipper_lm.utils.interruption import Interrupted, signal_of
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.places import beside, place_of
from zipper_lm.utils.progress import bar, plain_console

Engine = Literal["local", "ray"]
SHARD_ROWS = 1000
SETTINGS_FILE = "settings.json"
_FREE = ("broken_limit", "fraction", "validation_limit", "streaming", "buffer")
"""Fields of a data recipe that change no shard that is written: training heeds them, or the number of rows shows it."""


def prepare(
    recipe: FuseRecipe,
    output: str | Path,
    *,
    processes: int = 1,
    engine: Engine = "local",
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
        engine: ``"local"``: processes of this machine; ``"ray"``: of a cluster (`zipper_lm.jobs.ray_engine`).
        resume: go on after the whole shards of a run with the same settings that was cut off; one that is done has
            nothing left to do.
        overwrite: replace what is at `output`, and throw such a run away.
        shard_rows: rows of the source that one shard holds.
        console: where progress is told; `None` is standard error.

    Returns:
        What `prepared.json` says, and ``seconds``.

    Raises:
        ValueError: for an existing output, a tower without codec, data that cannot be read, more broken items than
            `data.broken_limit`, other settings than those of the run to go on with, or what the engine cannot do.
        Interrupted: after Ctrl-C; the whole shards are kept.
    """
    check_kind(recipe)
    started, given, data = time.monotonic(), recipe, recipe.data
    for name, value in (("processes", processes), ("shard_rows", shard_rows)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {get_args(Engine)}, got {engine!r}")
    if engine == "ray":
        check_ray(data)
    if resume and not overwrite and (done := _done(recipe, output)) is not None:
        return done
    recipe = with_towers(given)
    check_output(output, overwrite)
    check_sources(output, recipe, beside(output, "preparing"))
    source = DataSource(data)
    if source.prepared is not None:
        raise ValueError(f"data.source: {data.source} is prepared already; give the raw data")
    named = {m for template in recipe.tasks for m in parse_task(template, list(recipe.towers)).modalities}
    codecs, lacking = recipe_codecs(recipe)
    check_codecs(given, codecs)
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
        "rows": {name: identity_of(rows) for name, rows in splits.items()},
        "shard_rows": shard_rows,
    }
    working = beside(output, "preparing")
    _begin(working, settings, resume=resume, overwrite=overwrite)
    raw = {name: rows for name, rows in splits.items() if isinstance(rows, Rows)}
    job = Job(recipe, modalities, raw, splits[TRAIN].columns, working)
    try:
        written = _written(job, _all_shards(splits, shard_rows), processes, engine)
        notes = _encode(splits, written, broken, console)
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
    remove_folder(working)
    return description | {"seconds": round(time.monotonic() - started, 1)}


def _describe(codec: Codec) -> dict[str, Any]:
    return {
        "kind": codec.kind,
        "sha256": codec_hash(codec),
        "vocab_size": codec.vocab_size,
        "specials": [codec.bos_id, codec.eos_id, codec.pad_id],
        "rate": codec.rate,
    }


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
    with new_folder(working, overwrite=True) as new:
        write_json(new / SETTINGS_FILE, settings)


def _done(recipe: FuseRecipe, output: str | Path) -> dict[str, Any] | None:
    """What `prepared.json` says, if it says that this was done; nothing is left beside the output then."""
    file = Path(output) / PREPARED_FILE
    if not file.is_file():
        return None
    description, data = read_mapping(file), json.loads(as_json(_with_places(to_mapping(recipe.data))))
    if description.get("seed") != recipe.seed or description.get("data") != data:
        return None
    clear_done(output, "preparing")
    return description | {"seconds": 0.0}


def _encode(
    splits: Mapping[str, Any], written: Generator[dict[str, Any], None, None], broken: Broken, console: Console | None
) -> dict[str, list[dict[str, Any]]]:
    """The notes of all shards of every split, in order."""
    notes: dict[str, list[dict[str, Any]]] = {name: [] for name in splits}
    lengths = [len(rows) if isinstance(rows, Sequence) else None for rows in splits.values()]
    total = None if None in lengths else sum(n for n in lengths if n)
    done, told = 0, console or plain_console(stderr=True)
    with bar(told, "encoding", transient=True) as advance, closing(written):
        advance(0, total)
        for note in written:
            notes[Path(note["file"]).parts[0]].append(note)
            broken.extend(note["broken"])
            done += note["rows"] + len(note["broken"])
            advance(done, total)
    return notes


def _all_shards(splits: Mapping[str, Any], shard_rows: int) -> Iterator[Shard]:
    return chain.from_iterable(_shards(name, rows, shard_rows) for name, rows in splits.items())


def _shards(split: str, rows: Any, shard_rows: int) -> Iterator[Shard]:
    documents = isinstance(next(readable(rows), None), Document)
    if isinstance(rows, Rows):
        for number, start in enumerate(range(0, len(rows), shard_rows)):
            yield Shard(split, number, range(start, min(start + shard_rows, len(rows))), documents)
        return
    found, number = items(rows, Broken()), 0
    while chunk := list(islice(found, shard_rows)):
        yield Shard(split, number, chunk, documents)
        number += 1


def _written(
    job: Job, shards: Iterator[Shard], processes: int, engine: Engine
) -> Generator[dict[str, Any], None, None]:
    """The note of each shard, in order: of an earlier run, or written now."""
    if engine == "ray":
        return by_cluster(job, list(shards), processes)
    return by_processes(job, shards, processes) if processes > 1 else _here(job, shards)


def _here(job: Job, shards: Iterator[Shard]) -> Generator[dict[str, Any], None, None]:
    encoder = Encoder(job)
    for shard in shards:
        yield job.note(shard) or encoder.write(shard)


def _finish(
    job: Job,
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
