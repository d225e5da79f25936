"""Rows that are encoded while training goes on: what is seen, in which order, and after an interruption."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from zipper_lm.codecs.sequence import SequenceCodec, SequenceCodecConfig
from zipper_lm.data.buffered import BufferedDocuments, Placed
from zipper_lm.data.collation import Specials
from zipper_lm.data.document import Document
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.data.sources.objects import _Reached
from zipper_lm.data.sources.readers import read_rows, stream_rows
from zipper_lm.data.sources.table import Table

ROWS, BUFFER, COUNT = 23, 5, 60
DIGITS = SequenceCodec(SequenceCodecConfig(alphabet=tuple("0123456789")))
NAMES = ("text", "speech")
PROCESSOR = ZipperProcessor(dict.fromkeys(NAMES, DIGITS), dict.fromkeys(NAMES, Specials(10, 11, 12)))


def values(number: int) -> dict[str, str]:
    return {"text": f"{number:02}", "speech": f"{number:02}" * 3}


def of_tars(folder: Path) -> Any:
    for shard in range(3):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for number in range(ROWS)[shard * 8 : shard * 8 + 8]:
                for suffix, value in (("txt", values(number)["text"]), ("transcript", values(number)["speech"])):
                    member = tarfile.TarInfo(f"{number:04}.{suffix}")
                    member.size = len(value)
                    tar.addfile(member, io.BytesIO(value.encode()))
    return stream_rows(folder / "train-*.tar", {"text": "txt", "speech": "transcript"})


def of_jsonl(folder: Path) -> Any:
    (folder / "a.jsonl").write_text("".join(json.dumps(values(n)) + "\n" for n in range(ROWS)))
    return read_rows(folder / "a.jsonl")


def of_the_hub(folder: Path, limit: int | None = None) -> Any:
    """As `hub_splits` opens one: of three shards; a quarter of the rows is left out."""
    rows = [values(n) | {"speaker": "theo" if n % 4 == 3 else "ann"} for n in range(ROWS + 7)]
    made: Any = stream_rows(datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=3), limit=limit)
    reached = Table(_Reached(made._table.rows, "someone/data", None), columns=made._table.columns)
    return type(made)(reached, made.columns, {"speaker": ["theo"]})


SOURCES = {"tars": of_tars, "jsonl": of_jsonl, "hub": of_the_hub}


def buffered(rows: Any, **changes: Any) -> BufferedDocuments:
    how: dict[str, Any] = {"seed": 3, "buffer": BUFFER, "count": COUNT} | changes
    return BufferedDocuments(rows, {"speech->text": 1.0, "text->speech": 2.0}, PROCESSOR, ["speech", "text"], **how)


def told(document: Document) -> tuple[int, str]:
    """A document's row, and the task that it serves."""
    return int("".join(str(i) for i in document.last("text").ids or [])), "->".join(document.modalities)


@pytest.mark.parametrize("source", list(SOURCES))
def test_every_row_is_seen_once_in_each_epoch_and_near_its_place(source: str, tmp_path: Path) -> None:
    seen = [told(document) for document in buffered(SOURCES[source](tmp_path))]
    rows = [row for row, _ in seen]
    come = sorted(set(rows))
    assert len(come) == ROWS
    for epoch in (rows[:ROWS], rows[ROWS : 2 * ROWS]):
        assert sorted(epoch) == come
        assert epoch != come
        for first in range(0, ROWS, BUFFER):
            assert sorted(epoch[first : first + BUFFER]) == come[first : first + BUFFER]
    assert rows[:ROWS] != rows[ROWS : 2 * ROWS]
    tasks = {row: [task for each, task in seen if each == row] for row in come}
    assert {task for drawn in tasks.values() for task in drawn} == {"speech->text", "text->speech"}
    assert any(len(set(drawn)) > 1 for drawn in tasks.values()), "a task is drawn anew each time"
    assert [told(document) for document in buffered(SOURCES[source](tmp_path), seed=4)] != seen


def steps(documents: BufferedDocuments, world: int, workers: int, begin: int = 0) -> list[list[tuple[int, str]]]:
    """What is seen in each step of four documents, from a step on."""
    of_processes = []
    for rank in range(world):
        loader: Any = DataLoader(documents, 4 // world, num_workers=workers, collate_fn=list)
        loader = prepare_data_loader(loader, num_processes=world, process_index=rank, put_on_device=False)
        of_processes.append([[told(d) for d in batch] for batch in skip_first_batches(loader, begin)])
    return [[each for process in of_processes for each in process[step]] for step in range(len(of_processes[0]))]


@pytest.mark.parametrize("source", list(SOURCES))
def test_nothing_is_lost_or_repeated_by_an_interruption(source: str, tmp_path: Path) -> None:
    """At any step, on another number of processes, and of workers where the source allows them: by who has never seen
    the stream, from what a checkpoint keeps alone."""
    whole = buffered(SOURCES[source](tmp_path))
    expected = steps(whole, 1, 0)
    places = [json.dumps(getattr(document, "place", None)) for document in whole]
    for step, world in ((1, 1), (2, 2), (4, 4), (6, 1), (11, 2), (14, 4)):
        fresh = buffered(SOURCES[source](tmp_path))
        if source == "hub":
            fresh.go_on(json.loads(places[4 * step - 1]))
        assert steps(fresh, world, 0, step) == expected[step:], (step, world)
    if source != "hub":
        assert steps(buffered(SOURCES[source](tmp_path)), 1, 2, 3) == expected[3:]


def test_a_stream_is_gone_on_with_where_it_was_and_not_read_again() -> None:
    read: list[int] = []

    def generate(shards: list[int]) -> Any:
        for shard in shards:
            for number in range(shard * 10, shard * 10 + 10):
                read.append(number)
                yield values(number)

    def opened() -> Any:
        made = datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": [0, 1, 2, 3]})
        found = stream_rows(made, {"text": "text", "speech": "speech"})
        read.clear()
        return found

    documents = buffered(opened())
    seen = [told(documents[number]) for number in range(37)]
    place = documents[36]
    assert isinstance(place, Placed)
    again = buffered(opened())
    again.go_on(place.place)
    rest = [told(again[number]) for number in range(37, 40)]
    assert sorted(row for row, _ in seen + rest) == list(range(40))
    assert min(read) >= 30, "shards that were done are opened again"
    assert [told(again[number]) for number in range(37)] == seen, "what lies before can be had, too"


def test_a_limit_holds_from_wherever_it_is_gone_on(tmp_path: Path) -> None:
    """Of the source, and of what is left of it when some rows were left out."""
    for opened, count in ((of_the_hub(tmp_path, 16), 12), (of_the_hub(tmp_path).first(7), 7)):
        seen = list(buffered(opened, count=30))
        assert len({told(document)[0] for document in seen}) == count
        again = buffered(opened, count=30)
        again.go_on(seen[6].place)  # type: ignore[attr-defined]
        assert [told(again[number]) for number in range(7, 30)] == [told(document) for document in seen[7:]]


def test_what_cannot_be_read_or_is_too_long_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "1", "speech": "2"}\n{"text": "x", "speech": "2"}\n')
    rows = read_rows(tmp_path / "a.jsonl")
    documents = buffered(rows, buffer=1)
    assert told(documents[0])[0] == 1
    with pytest.raises(ValueError, match=r"a\.jsonl:2"):
        documents[1]
    short = buffered(rows, buffer=1, limits=[(["text", "speech"], 5, "the single decoder")])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: a stream of 6 tokens, and the single decoder has 5 positions"):
        short[0]
    stream: Any = stream_rows(datasets.Dataset.from_list([values(0)]).to_iterable_dataset())
    with pytest.raises(ValueError, match="the stream has no rows"):
        buffered(stream.without({"text": ["00"]}))[0]
    with pytest.raises(ValueError, match="buffer must be at least 1, got 0"):
        buffered(rows, buffer=0)
