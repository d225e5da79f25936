"""`zipper prepare`: the same ids once and for all, whatever was in between."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
from tiny_recipes import say, tiny_recipe, workshop

from zipper_lm import Document
from zipper_lm.data.encoding import encode_rows, token_counts
from zipper_lm.data.prepared import open_prepared
from zipper_lm.data.sources.readers import read_rows
from zipper_lm.jobs import prepare as prepare_module
from zipper_lm.jobs import ray_engine
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.prepare import prepare
from zipper_lm.jobs.rows import DataSource
from zipper_lm.jobs.shards import Encoder
from zipper_lm.jobs.towers import build_model
from zipper_lm.training.callbacks import Interrupted
from zipper_lm.utils import files
from zipper_lm.utils.places import working_folder


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "prepared.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_was_prepared_is_what_training_would_encode(prepared: Path) -> None:
    recipe = tiny_recipe(prepared / "m")
    processor = build_model(recipe).processor
    assert processor is not None
    fresh = encode_rows(processor, DataSource(recipe.data).training_rows(), ["speech", "text"])
    rows = open_prepared(prepared).rows("train")
    assert list(rows) == list(fresh)
    assert rows[3:5][1] == fresh[4]
    assert rows[-1] == fresh[-1]
    assert list(token_counts(rows[2:9])) == list(token_counts(list(rows)[2:9]))
    told = described(prepared)
    assert [s["rows"] for s in told["splits"]["train"]["shards"]] == [5, 5, 2]
    assert told["splits"]["train"]["tokens"]["speech"] == sum(len(row["speech"].ids) for row in fresh)
    assert told["splits"]["train"]["seconds"]["speech"] == pytest.approx(
        told["splits"]["train"]["tokens"]["speech"] / 25
    )
    assert told["splits"]["validation"]["rows"] == 4
    assert not list(prepared.parent.glob("*.preparing"))
    with pytest.raises(ValueError, match="holds prepared ids only"):
        read_rows(prepared)


@pytest.mark.slow  # each process imports torch and transformers anew
def test_the_number_of_processes_changes_nothing(prepared: Path, tmp_path: Path) -> None:
    prepare(tiny_recipe(tmp_path / "m"), tmp_path / "two", shard_rows=5, processes=2)
    assert contents(tmp_path / "two") == contents(prepared)
    data = {"source": broken_folder(tmp_path / "raw"), "validation": None, "broken_limit": 3}
    for processes in (1, 2):
        recipe = tiny_recipe(tmp_path / "m", data=data)
        prepare(recipe, tmp_path / f"broken-{processes}", shard_rows=3, processes=processes)
    assert contents(tmp_path / "broken-1") == contents(tmp_path / "broken-2")
    recipe.data.broken_limit = 2
    with pytest.raises(
        ValueError, match=r"more broken items than data\.broken_limit=2, the first are .*csv:3: .*csv:6"
    ):
        prepare(recipe, tmp_path / "less", shard_rows=3, processes=2)


def test_a_run_that_was_cut_off_goes_on(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = Encoder.write, []

    def cut(self: Any, shard: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.file)
        return write(self, shard)

    recipe = tiny_recipe(tmp_path / "m")
    with pytest.raises(ValueError, match=r"nothing to resume: there is no .*ids\.preparing"):
        prepare(recipe, tmp_path / "ids", resume=True)
    monkeypatch.setattr(Encoder, "write", cut)
    with pytest.raises(Interrupted, match=r"go on with resume"):
        prepare(recipe, tmp_path / "ids", shard_rows=5)
    assert not (tmp_path / "ids").exists()
    with pytest.raises(ValueError, match="holds an interrupted run"):
        prepare(recipe, tmp_path / "ids", shard_rows=5)
    with pytest.raises(ValueError, match=r"cannot resume: \['shard_rows'\] changed"):
        prepare(recipe, tmp_path / "ids", shard_rows=6, resume=True)
    limited = tiny_recipe(tmp_path / "m", data={"source": str(workshop() / "data"), "limit": 3})
    with pytest.raises(ValueError, match=r"cannot resume: \['data', 'rows'\] changed"):
        prepare(limited, tmp_path / "ids", shard_rows=5, resume=True)
    # The second shard has its note but is cut off: it is written anew, the first is not.
    (tmp_path / "ids.preparing" / "train" / "00001.arrow").write_bytes(b"ARROW1")
    written.clear()

    def told(self: Any, shard: Any) -> Any:
        written.append(shard.file)
        return write(self, shard)

    monkeypatch.setattr(Encoder, "write", told)
    prepare(recipe, tmp_path / "ids", shard_rows=5, resume=True)
    assert written == ["train/00001.arrow", "train/00002.arrow", "validation/00000.arrow"]
    assert contents(tmp_path / "ids") == contents(prepared)


def broken_folder(folder: Path) -> str:
    """Eight rows; one is no sound, one is missing, one says what the tokenizer lacks."""
    folder.mkdir()
    texts = ["one", "two", "six", "one", "ω", "two", "six", "one"]
    for number, text in enumerate(texts):
        soundfile.write(folder / f"{number}.wav", say("one" if text == "ω" else text), 16_000)
    (folder / "1.wav").write_bytes(b"RIFF")
    (folder / "6.wav").unlink()
    (folder / "metadata.csv").write_text(
        "file_name,transcription\n" + "".join(f"{n}.wav,{t}\n" for n, t in enumerate(texts))
    )
    return str(folder)


def test_broken_items_are_left_out_listed_and_limited(tmp_path: Path) -> None:
    data = {"source": broken_folder(tmp_path / "raw"), "validation": None}
    recipe = tiny_recipe(tmp_path / "m", data={**data, "broken_limit": 3})
    told = prepare(recipe, tmp_path / "ids", shard_rows=3)
    assert told["broken"] == 3
    listed = [json.loads(line) for line in (tmp_path / "ids" / "broken.jsonl").read_text().splitlines()]
    assert [item["source"].rsplit("/", 1)[1] for item in listed] == [f"metadata.csv:{n}" for n in (3, 6, 8)]
    for item, reason in zip(listed, ("not a sound file", "the tokenizer lacks", "no such audio file")):
        assert reason in item["reason"]
    assert [row["text"].value for row in open_prepared(tmp_path / "ids").rows("train")] == [
        *("one", "six", "one", "two", "one")
    ]
    recipe.data.broken_limit = 2
    with pytest.raises(
        ValueError, match=r"more broken items than data\.broken_limit=2, the first are .*csv:3: .*csv:6"
    ):
        prepare(recipe, tmp_path / "less", shard_rows=3)
    recipe.data.broken_limit = 0
    with pytest.raises(ValueError, match=r"file '.*6\.wav' does not exist"):
        prepare(recipe, tmp_path / "none", shard_rows=3)
    assert not (tmp_path / "less").exists()


def test_a_fusion_leaves_broken_items_out_and_records_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"source": broken_folder(tmp_path / "raw"), "validation": None, "broken_limit": 3}
    record = fuse(tiny_recipe(tmp_path / "m", data=data))
    assert len(record["broken"]) == 3
    assert json.loads((tmp_path / "m" / "run.json").read_text())["broken"] == record["broken"]
    assert "3 broken items left out" in " ".join(capsys.readouterr().err.split())


def test_clips_are_prepared_apart(tmp_path: Path) -> None:
    clips = {"source": str(workshop() / "data"), "count": 7, "words": 2}
    data = {"source": str(workshop() / "data"), "validation": None, "clips": clips, "fraction": 0.5}
    recipe = tiny_recipe(tmp_path / "m", data=data)
    prepare(recipe, tmp_path / "ids")
    assert described(tmp_path / "ids")["splits"]["train"]["rows"] == 12  # the fraction is drawn in training
    processor = build_model(recipe).processor
    assert processor is not None
    fresh = encode_rows(processor, DataSource(recipe.data).training_rows(), ["speech", "text"])
    recipe.data.source = str(tmp_path / "ids")
    rows = encode_rows(processor, DataSource(recipe.data).training_rows(), ["speech", "text"])
    assert list(rows) == list(fresh)
    assert len(rows) == 13
    assert rows[5:7] == fresh[5:7]
    assert recipe.data.clips is not None
    others = replace(recipe.data, exclude={"speaker": ["odd"]})  # the clips had all speakers in them
    with pytest.raises(ValueError, match=r"data\.clips: .*'exclude': \{\}.* wants .*'exclude': \{'speaker'"):
        DataSource(others).training_rows()
    recipe.data.clips.words = 3
    with pytest.raises(ValueError, match=r"data\.clips: .*'words': 2.* the recipe wants .*'words': 3"):
        DataSource(recipe.data).training_rows()


def documents(file: Path) -> Path:
    sound = str(workshop() / "data" / "train" / "0.wav")
    segments = [
        {"modality": "speech", "value": sound},
        {"modality": "text", "value": "one six", "target": True},
        {"modality": "speech", "ids": [3, 4], "target": True},
    ]
    file.write_text(json.dumps({"segments": segments}) + "\n" + json.dumps({"segments": segments[:2]}) + "\n")
    return file


def test_whole_documents(tmp_path: Path) -> None:
    data = {"source": str(documents(tmp_path / "data.jsonl")), "validation": None}
    recipe = tiny_recipe(tmp_path / "m", data=data)
    processor = build_model(recipe).processor
    assert processor is not None
    fresh = encode_rows(processor, DataSource(recipe.data).training_rows(), ["speech", "text"])
    prepare(recipe, tmp_path / "ids")
    rows = open_prepared(tmp_path / "ids").rows("train")
    assert isinstance(rows[0], Document)
    assert [d.segments for d in rows] == [d.segments for d in fresh]
    assert len(rows.without({"speaker": ["kim"]})) == 2  # whole documents have no columns
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write('{"text": "one", "speech": "%s"}\n' % (workshop() / "data" / "train" / "0.wav"))
    with pytest.raises(ValueError, match=r"data\.jsonl:3: a split holds either rows or whole documents, not both"):
        prepare(recipe, tmp_path / "mixed")


def test_from_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a stream go to the processes as they come; the ids are those of the whole data set."""
    import datasets

    rows = list(read_rows(workshop() / "data"))
    whole = datasets.Dataset.from_list([{"text": r["text"], "audio": Path(r["speech"]).read_bytes()} for r in rows])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train"])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, streaming, **__: whole.to_iterable_dataset() if streaming else whole
    )
    ids = []
    for streaming in (True, False):
        data = {"source": "someone/data", "validation": None, "streaming": streaming}
        prepare(tiny_recipe(tmp_path / "m", data=data), tmp_path / str(streaming), shard_rows=5, processes=1)
        ids.append(list(open_prepared(tmp_path / str(streaming)).rows("train")))
    assert ids[0] == ids[1]
    assert len(ids[0]) == len(rows)


def test_what_ray_cannot_do_is_refused_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"engine must be one of .*, got 'spark'"):
        prepare(tiny_recipe(tmp_path / "m"), tmp_path / "ids", engine="spark")  # type: ignore[arg-type]
    monkeypatch.setattr(ray_engine, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs Ray Data: pip install "zipper-lm\[ray\]"'):
        prepare(tiny_recipe(tmp_path / "m"), tmp_path / "ids", engine="ray")
    monkeypatch.setattr(ray_engine, "find_spec", lambda name: name)
    recipe = tiny_recipe(tmp_path / "m", data={"source": "someone/data", "validation": None, "streaming": True})
    with pytest.raises(ValueError, match=r"cannot be fed by data\.streaming"):
        prepare(recipe, tmp_path / "ids", engine="ray")


def test_bad_settings(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "m")
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        prepare(recipe, tmp_path / "ids", processes=0)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists"):
        prepare(recipe, tmp_path / "there")
    towers = {"text": {"source": str(tmp_path / "none"), "pretrain": {}}, "speech": str(workshop() / "speech")}
    with pytest.raises(ValueError, match=r"towers\.text: .*none is not made yet"):
        prepare(tiny_recipe(tmp_path / "m", towers=towers), tmp_path / "ids")


def test_the_last_step_can_be_repeated(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards were moved into the folder that becomes the output: a Ctrl-C or a full disk just before it did deleted
    them, and hours of encoding with them."""

    def cut(folder: Path) -> None:
        if folder.name == "ids":  # codecs are saved too, to be hashed
            raise KeyboardInterrupt

    recipe = tiny_recipe(tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr(files, "_flush_folder", cut)
        with pytest.raises(Interrupted, match="go on with resume"):
            prepare(recipe, tmp_path / "ids", shard_rows=5)
    assert not (tmp_path / "ids").exists()
    monkeypatch.setattr(Encoder, "write", lambda *_: pytest.fail("encoded again"))
    prepare(recipe, tmp_path / "ids", shard_rows=5, resume=True)
    assert contents(tmp_path / "ids") == contents(prepared)
    assert not (tmp_path / "ids.preparing").exists()


def test_shards_are_copied_where_they_cannot_be_linked(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems have no hard links."""

    def refuse(*_: Any) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(prepare_module.os, "link", refuse)
    prepare(tiny_recipe(tmp_path / "m"), tmp_path / "ids", shard_rows=5)
    assert contents(tmp_path / "ids") == contents(prepared)


@pytest.mark.parametrize("output", ["raw", "raw/train", "."])
def test_what_is_read_is_not_overwritten(tmp_path: Path, output: str) -> None:
    """`--overwrite` with the data's own folder, or one above it, replaced the recordings by their ids."""
    (tmp_path / "all").mkdir()
    shutil.copytree(workshop() / "data", tmp_path / "all" / "raw")
    recipe = tiny_recipe(tmp_path / "m", data=str(tmp_path / "all" / "raw"))
    with pytest.raises(ValueError, match=r"would replace data\.source"):
        prepare(recipe, tmp_path / "all" / output, overwrite=True)
    recipe.output, recipe.overwrite = str(tmp_path / "all" / output), True
    with pytest.raises(ValueError, match=r"would replace data\.source"):
        fuse(recipe)
    recipe.data.source = str(tmp_path / "ids.preparing" / "raw")  # which is emptied before, and gone after
    with pytest.raises(ValueError, match=r"would replace data\.source"):
        prepare(recipe, tmp_path / "ids")
    recipe.data.source = str(tmp_path / "all" / "raw")
    inside = tmp_path / "all" / "raw" / "ids"
    prepare(recipe, inside)
    prepare(recipe, inside, overwrite=True)  # what was written there before is an output


def test_a_folder_that_only_looks_like_ours_is_kept(tmp_path: Path) -> None:
    """Whatever lay beside the output under the working folder's name was deleted, without being told to."""
    recipe = tiny_recipe(tmp_path / "out", overwrite=True)
    for suffix in ("preparing", "training"):
        (tmp_path / f"out.{suffix}").mkdir()
        (tmp_path / f"out.{suffix}" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.preparing is in the way"):
        prepare(recipe, tmp_path / "out", overwrite=True)
    with pytest.raises(ValueError, match=r"out\.training is in the way"):
        fuse(recipe)
    assert [file.read_text() for file in tmp_path.glob("out.*/notes.txt")] == ["mine", "mine"]


def test_a_slash_at_the_end_of_the_output_is_no_matter(prepared: Path, tmp_path: Path) -> None:
    """The working folder of ``ids/`` was ``ids/.preparing``: after all was encoded, the output was found to exist."""
    prepare(tiny_recipe(tmp_path / "m"), f"{tmp_path / 'ids'}/", shard_rows=5)
    assert contents(tmp_path / "ids") == contents(prepared)
    assert working_folder("runs/model/") == Path("runs/model.training")


def test_nothing_left_is_no_success(tmp_path: Path) -> None:
    """With every item broken, within data.broken_limit, an empty data set was written, on which training failed."""
    (tmp_path / "raw.jsonl").write_text('{"text": "ω", "speech": "none.wav"}\n')
    data = {"source": str(tmp_path / "raw.jsonl"), "validation": None, "broken_limit": 5}
    with pytest.raises(ValueError, match=r"nothing of split 'train' could be encoded; 1 broken items .*raw\.jsonl:1"):
        prepare(tiny_recipe(tmp_path / "m", data=data), tmp_path / "ids")
    assert not (tmp_path / "ids").exists()


def test_a_broken_item_that_comes_first_is_one_of_many(tmp_path: Path) -> None:
    """What comes first is looked at to know what the data is like; if that was broken, or anything was and a column was
    to be excluded by, data.broken_limit did not help."""
    files: dict[str, bytes] = {}
    for number, text in enumerate(["", "one", "two", "six"]):
        described = json.dumps({"caption": text, "who": "ann" if text == "two" else "bob"})
        files |= {f"{number}.json": described.encode() if text else b"{"}
        files |= {f"{number}.wav": (workshop() / "data" / "train" / "0.wav").read_bytes()}
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    data = {"source": str(tmp_path / "x.tar"), "validation": None, "broken_limit": 1, "exclude": {"who": ["ann"]}}
    told = prepare(tiny_recipe(tmp_path / "m", data=data), tmp_path / "ids")
    assert told["broken"] == 1
    assert [row["text"].value for row in open_prepared(tmp_path / "ids").rows("train")] == ["one", "six"]


def test_prepared_data_knows_its_source_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source was kept as typed: from another working directory, no judge could be fitted on the originals."""
    monkeypatch.chdir(workshop())
    prepare(tiny_recipe(tmp_path / "m", data={"source": "data", "limit": 2}), tmp_path / "ids")
    assert described(tmp_path / "ids")["data"]["source"] == str((workshop() / "data").resolve())


def test_a_source_that_changed_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the number of rows was compared: a run that was cut off went on with another data set of as many."""
    from datasets import Dataset

    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    def say_in(text: str) -> None:
        folder = tmp_path / "data"
        shutil.rmtree(folder, ignore_errors=True)
        if kind == "jsonl":
            (tmp_path / "data.jsonl").write_text(json.dumps({"text": text, "speech": sound}) + "\n")
        elif kind == "disk":
            Dataset.from_list([{"text": text, "speech": "0.wav"}]).save_to_disk(folder)
            shutil.copy(sound, folder)
        else:
            (tmp_path / "1.txt").write_text(text)
            with tarfile.open(tmp_path / "data.tar", "w") as archive:
                archive.add(tmp_path / "1.txt", "1.txt")
                archive.add(sound, "1.wav")

    sound = str(workshop() / "data" / "train" / "0.wav")
    monkeypatch.setattr(Encoder, "write", cut)
    for kind, name in {"jsonl": "data.jsonl", "disk": "data", "tar": "data.tar"}.items():
        say_in("one")
        recipe = tiny_recipe(tmp_path / "m", data={"source": str(tmp_path / name), "validation": None})
        with pytest.raises(Interrupted):
            prepare(recipe, tmp_path / kind)
        with pytest.raises(Interrupted):  # as it was
            prepare(recipe, tmp_path / kind, resume=True)
        say_in("two")
        with pytest.raises(ValueError, match=r"cannot resume: \['rows'\] changed"):
            prepare(recipe, tmp_path / kind, resume=True)


def test_documents_may_hold_ids_of_a_tower_without_codec(tmp_path: Path) -> None:
    """Training took them, `zipper prepare` called the modality unknown."""
    towers = {name: str(workshop() / name) for name in ("text", "speech")}
    towers["gene"] = str(shutil.copytree(workshop() / "text", tmp_path / "gene"))
    for file in (tmp_path / "gene").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    segments: list[dict[str, Any]] = [{"modality": "gene", "ids": [3, 4]}, {"modality": "text", "value": "one"}]
    segments[1]["target"] = True
    (tmp_path / "data.jsonl").write_text(json.dumps({"segments": segments}) + "\n")
    data: dict[str, Any] = {"source": str(tmp_path / "data.jsonl"), "validation": None}
    told = prepare(tiny_recipe(tmp_path / "m", data=data, towers=towers), tmp_path / "ids")
    assert told["splits"]["train"]["tokens"]["gene"] == 2
    del segments[0]["ids"]
    segments[0]["value"] = "ACGT"
    (tmp_path / "data.jsonl").write_text(json.dumps({"segments": segments}) + "\n")
    with pytest.raises(ValueError, match="no codec for modality 'gene'"):
        prepare(tiny_recipe(tmp_path / "m", data=data, towers=towers), tmp_path / "raw")


PREPARING = """
import sys
from pathlib import Path
from tiny_recipes import tiny_recipe
from zipper_lm.jobs.prepare import prepare

if __name__ == "__main__":
    source, output = sys.argv[1:]
    prepare(tiny_recipe(Path(output) / "m", data=source), Path(output) / "ids", processes=2, shard_rows=1)
"""


@pytest.mark.slow
def test_the_processes_of_a_run_that_was_killed_end(prepared: Path, tmp_path: Path) -> None:
    """They waited for ever for a process that was gone, each with its codecs in memory; and what they had begun lay in
    the folder for ever."""
    data = tmp_path / "data"
    shutil.copytree(workshop() / "data", data)
    (tmp_path / "run.py").write_text(PREPARING)
    words = [sys.executable, str(tmp_path / "run.py"), str(data), str(tmp_path)]
    with subprocess.Popen(words, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}) as parent:
        train = tmp_path / "ids.preparing" / "train"
        for _ in range(1200):
            if len(list(train.glob("*.json"))) >= 2 or parent.poll() is not None:
                break
            time.sleep(0.05)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.kill()
    assert children
    for _ in range(100):
        states = [Path(f"/proc/{child}/stat") for child in children]
        if not any(f.exists() and f.read_text().rsplit(")", 1)[1].split()[0] != "Z" for f in states):
            break
        time.sleep(0.1)
    else:
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        pytest.fail("still there")
    recipe = tiny_recipe(tmp_path / "m", data=str(data))
    prepare(recipe, tmp_path / "ids", shard_rows=1, resume=True)
    left = [path.name for path in tmp_path.rglob(".*")]
    assert not left
