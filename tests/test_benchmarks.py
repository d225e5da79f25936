"""Each benchmark ends its output with its record, one line of JSON, and what it writes is the same."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import doc, tiny_backbone, tiny_model, tiny_whisper
from tiny_recipes import plain_recipe
from transformers import WhisperFeatureExtractor

from tests.codecs.test_hubert_units import whisper
from tests.codecs.test_speech import voice
from zipper_lm import ZipperModel
from zipper_lm.codecs.audio import write_audio
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.experiments.plan import read_experiment
from zipper_lm.fusion import backbones
from zipper_lm.fusion.backbones import from_config
from zipper_lm.utils.tensors import weights_hash

ROOT = Path(__file__).parent.parent


def run_small(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: Any, **changes: Any) -> None:
    """The benchmark's `main` with other globals, run as a script: what lies beside it can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    loaded = runpy.run_path(str(ROOT / "benchmarks" / name))
    main = loaded["main"]
    for key, value in changes.items():
        monkeypatch.setitem(main.__globals__, key, value(loaded[key]))
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    main()


def test_every_benchmark_is_run_here() -> None:
    there = {f.stem for f in (ROOT / "benchmarks").glob("*.py")}
    assert there <= {name.removeprefix("test_") for name in globals()}


def test_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def tiny(sizes: dict[str, Any]) -> dict[str, Any]:
        return {"small": replace(sizes["small"], text=(16, 4), speech=(16, 4), as_large=(16, 4))}

    small = {"SIZES": tiny, "GENERATED": lambda _: 2}
    run_small("cost.py", monkeypatch, tmp_path / "cost.json", "--quick", "--repeats", 1, **small)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "cost.json").read_text())
    assert record["rows"][0]["ratio_to_zipper"]["single-decoder"]["training step"] > 0


def test_joint_or_combined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What it trains takes an hour; here only what it keeps of it."""
    ran: list[int] = []

    def one_seed(_: Any) -> Any:
        return lambda data, work, seed, changes: ran.append(seed) or {"joint": {"steps": seed}}

    for seeds in ([1], [1, 2]):
        given = ("data", tmp_path, tmp_path / "record.json", "--seeds", *seeds)
        run_small("joint_or_combined.py", monkeypatch, *given, one_seed=one_seed)
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert list(record["seeds"]) == ["1", "2"]
    assert ran == [1, 2], "a finished seed is not run again"
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert len(lines) == 2


def test_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is of a large fusion; here of a tiny one, and what it says of the measured one is not counted."""
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text(json.dumps(plain_recipe(tmp_path / "output")))
    given = (tmp_path / "plan.json", "--recipe", tiny)
    run_small("plan.py", monkeypatch, *given, beside_measured=lambda _: lambda row: {"batch": row["batch"]})
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "plan.json").read_text())
    assert {row["processes"] for row in record["plan"]["processes"]} == {1, 8, 64, 512}
    assert [row["batch"] for row in record["measured"]] == [1, 16, 4]


def test_epoch_order(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_small("epoch_order.py", monkeypatch, "--rows", 1000)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["rows"] == 1000
    assert set(record["seconds"]["both ways"]) == {"first epoch", "later epoch", "order"}


def test_rows_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its numbers of rows have processes of their own, which would take long here."""

    def run(command: list[str], **_: Any) -> Any:
        found = module["one"](Path(tempfile.mkdtemp(dir=tmp_path)), int(command[-1]))
        return subprocess.CompletedProcess(command, 0, json.dumps(found).encode())

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = runpy.run_path(str(ROOT / "benchmarks" / "rows_in_memory.py"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["rows_in_memory.py", str(tmp_path / "r.json"), "--rows", "200", "1200"])
    module["main"]()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "r.json").read_text())
    assert [each["rows"] for each in record["of"]] == [200, 1200]
    assert set(record["bytes_a_row"]) == {"prepare", "read"}
    held: list[int] = []
    with module["watched"](held.append):
        block = bytearray(50 << 20)
        time.sleep(0.05)
        block[::4096] = bytes(len(block) // 4096)
        del block
    assert held[0] >= 50 << 20, "what was there in between is measured"


def test_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The loop by hand, which keeps nothing, writes what the plain path does; torchtune is not installed here."""
    loop = "two towers, nothing kept"
    names = ["plain", "plain, with feed-forward", "engine, not compiled", "bare", "single decoder", "Mllama"]
    names += ["DeepFusion", loop]
    given = (tmp_path / "decode.json", "--size", "tiny", "--batch", 2, "--quick", "--only", *names)
    monkeypatch.setitem(sys.modules, "torchtune", None)
    run_small("decode.py", monkeypatch, *given)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "decode.json").read_text())
    (part,) = record["parts"]
    assert part["two_towers_write_what_plain_does"] is True
    assert set(part["writers"]) == set(names)
    assert "torchtune" in part["writers"].pop("DeepFusion")["not_run"]
    assert all({"tokens_a_second", "time_to_plain", "time_to_bare"} <= set(row) for row in part["writers"].values())
    assert part["writers"]["plain"]["time_to_plain"] == 1


def test_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--size", "tiny", "--guided-size", "tiny", "--documents", 3, "--repeats", 1, "--no-compile")
    run_small("engine.py", monkeypatch, tmp_path / "engine.json", *few)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "engine.json").read_text())
    for part in ("reading", "speaking"):
        assert record[part]["documents"] == 3
        assert record[part]["same_tokens"] is True
        assert record[part]["times_as_fast"] > 0
    assert isinstance(record["guided"]["guided_to_unguided"], float)


def test_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_small("products.py", monkeypatch, tmp_path / "products.json", "--sizes", "tiny", "--repeats", 1)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "products.json").read_text())
    assert record["tiny"]["times_as_fast"] > 0
    assert float(record["tiny"]["losses_apart"]) < 1e-4


def test_narrow_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """int8 changes what a language model says; a tower that is frozen is written with, and what it hears is counted."""
    codec = TextCodec.train(["one two three four"] * 8, vocab_size=24)
    codec.tokenizer.save_pretrained(tmp_path / "llm")
    tiny_backbone("llama", codec.vocab_size).save_pretrained(tmp_path / "llm")
    (tmp_path / "texts.txt").write_text("four three two one " * 40)
    model = tiny_model()
    model.processor = ZipperProcessor({"text": codec}, model.specials)
    monkeypatch.setattr(ZipperModel, "from_pretrained", lambda folder: model)
    said = ["one two", "three"], [doc(("speech", [5, 6, 7])), doc(("speech", [8]))]
    given = ("--llm", tmp_path / "llm", "--texts", tmp_path / "texts.txt", "--model", "folder")
    run_small("narrow_weights.py", monkeypatch, tmp_path / "r.json", *given, spoken=lambda _: lambda *a: said)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "r.json").read_text())
    found = record["perplexity"]["perplexity"]
    assert found["int8"] == pytest.approx(found["as they are"], rel=0.01)
    assert found["int8"] != found["as they are"]
    assert record["reading"]["same_text"]["as they are"] == 2
    assert set(record["reading"]["difference_and_95"]) == {"bf16", "int8"}


def test_steps_to_click(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tasks, of which one clicks at the first look, as whatever is below 1000 % counts; none is run twice.

    Each is trained alone: a recipe with joint CTC for one of them, such as the demo's, was refused for the other.
    """
    beside = {"ctc": {"speech->text": 1.0}, "fade_out": 0.5}
    recipe = plain_recipe(tmp_path / "model", training=beside)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    given = (tmp_path / "work", tmp_path / "record.json", "--recipe", tmp_path / "recipe.yaml", "--every", 1)
    given = (*given, "--cap", 2, "--rows", 2, "--seeds", 1)
    run_small("steps_to_click.py", monkeypatch, *given, "--tasks", "speech->text", CLICK=lambda _: 1000.0)
    run_small("steps_to_click.py", monkeypatch, *given, CLICK=lambda _: 0.0)
    record = json.loads((tmp_path / "record.json").read_text())
    assert [(run["task"], run["click"], len(run["curve"])) for run in record["runs"]] == [
        ("speech->text", 1, 1),
        ("text->speech", None, 2),
    ]
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["task"], row["median"], row["worst"]) for row in last["summary"]] == [
        ("speech->text", 1, 1),
        ("text->speech", None, None),
    ]


def test_stream_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps do not suffice, whatever the stream."""
    small = {"CAP": lambda _: 2, "FACTORS": lambda _: (16,)}
    run_small("stream_scale.py", monkeypatch, tmp_path / "record.json", "--seeds", 1, **small)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert [(row["factor"], row["worst"]) for row in record["rows"]] == [(16, 2)] * 4


def test_what_the_script_for_a_gpu_names_exists() -> None:
    """On a GPU nobody has time to mend a flag: each command's script, files of tests and flags are there."""
    listed = subprocess.run([ROOT / "benchmarks/gpu.sh", "--list"], capture_output=True, text=True, check=True)
    commands = [line.split()[1:] for line in listed.stdout.splitlines()]
    assert len(commands) >= 8
    for script, *words in (c for c in commands if c[0] != "-m"):
        source = (ROOT / script).read_text()
        assert "OUT" in words
        assert not [w for w in words if w.startswith("--") and f'"{w}"' not in source], script
        assert not [w for w in words if w.endswith(".py") and not (ROOT / w).exists()]
    for command in (c for c in commands if c[0] == "-m"):
        assert not [w for w in command if w.startswith("tests") and not (ROOT / w).exists()]


def test_a_part_that_fails_on_a_gpu_does_not_keep_the_others_from_running(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "benchmarks/gpu.sh", "--dry-run", tmp_path / "out"], env={**os.environ, "PYTHON": "false"}
    )
    ended = [json.loads(line)["ended"] for line in (tmp_path / "out" / "parts.jsonl").read_text().splitlines()]
    assert done.returncode == 1
    assert len(ended) >= 4
    assert set(ended) == {1}


def test_the_real_llm_on_a_gpu_is_one_run_of_the_experiment_and_says_how_it_ended() -> None:
    """The recipe once said that `gpu.sh` ran it, where it was not in there."""

    def run(python: str, *given: str) -> subprocess.CompletedProcess[str]:
        script = [ROOT / "benchmarks/gpu_real_llm.sh", *given]
        return subprocess.run(script, env={**os.environ, "PYTHON": python}, capture_output=True, text=True)

    module, name, command, file, flag, runs, *_ = run("echo").stdout.split(maxsplit=6)
    assert (module, name, command, flag, runs) == (
        "-m",
        "zipper_lm",
        "experiment",
        "--only",
        "zipper--10000-pairs--seed1",
    )
    assert (ROOT / file).is_file()
    read_experiment(ROOT / file, ["training.save_every=200", "training.arguments={bf16: true}"])
    assert run("echo", "*--seed2", "data=here").stdout.rstrip().endswith("data=here")
    assert "--only *--seed2" in run("echo", "*--seed2").stdout
    assert run("false").returncode == 1


def test_plain_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = (tmp_path / "plain.json", "--size", "tiny", "--batches", 1, 2, "--repeats", 1)
    run_small("plain_path.py", monkeypatch, *given)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "plain.json").read_text())
    assert [(row["batch"], row["feed_forward"]) for row in record["rows"]] == [(1, False), (2, False), (1, True)]
    assert all(isinstance(row["zipped_to_bare"], float) for row in record["rows"])


def test_prefix_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_small("prefix_cache.py", monkeypatch, tmp_path / "prefix.json", "--size", "tiny", "--repeats", 1)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "prefix.json").read_text())
    assert [row["tasks"] for row in record["rows"]] == [["speech->text"], ["speech->text", "text->speech"]]
    for row in record["rows"]:
        assert row["layers kept"] == [4]
        assert set(row["without to kept"]) == {"memory", "disk"}


def test_chunked_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("zipper_lm.fusion.head.HELD", 1)  # put back what the script sets
    run_small("chunked_loss.py", monkeypatch, tmp_path / "loss.json", "--size", "tiny", "--repeats", 1)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "loss.json").read_text())
    assert record["held"] == 2400
    assert record["losses"]["parts"] == pytest.approx(record["losses"]["whole"], rel=1e-5)
    assert record["held_mib"].keys() == {"whole", "parts"}
    assert isinstance(record["parts_to_whole"]["seconds"], float)


def test_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In random order rows that are shared have less padding, and all the same tokens."""
    given = (tmp_path / "packing.json", "--repeats", 1, "--batch", 8)
    run_small("packing.py", monkeypatch, *given, BATCHES=lambda _: 1)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "packing.json").read_text())
    share = record["useful_share"]
    assert share["random order, padded"] < share["random order, packed"] <= 1
    assert share["random order, padded"] < share["like lengths, padded"] <= 1
    assert {"like lengths", "random order"} < set(record["packed_against_padded"])


def test_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the lists hold is what `collate` makes: the two that are compared do the same work."""
    small = {"TIMES": lambda _: {"short": 1}, "STEPS": lambda _: 1, "BATCH": lambda _: 2}
    run_small("loading.py", monkeypatch, tmp_path / "loading.json", "--repeats", 1, **small)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "loading.json").read_text())
    (row,) = record["rows"].values()
    assert row["batch_by_lists_against_arrays"] > 0
    assert {workers: set(found) for workers, found in row["by_workers"].items()} == {
        "0": {"step", "waited"},
        "1": {"step", "waited"},
    }


def test_model_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Only without what is measured are weights drawn and hashes computed: twice each, as there are two turns."""
    done: list[str] = []

    def hashed(*args: Any) -> str:
        done.append("hash")
        return weights_hash(*args)

    def made(*args: Any, **kwargs: Any) -> Any:
        done.extend([] if torch.empty(0).is_meta else ["drawn"])
        return from_config(*args, **kwargs)

    monkeypatch.setattr(backbones, "weights_hash", hashed)
    monkeypatch.setattr(backbones, "from_config", made)
    run_small("model_loading.py", monkeypatch, tmp_path / "loading.json", "--size", "tiny", "--repeats", 1)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "loading.json").read_text())
    assert [(row["text tower"], row["without"]) for row in record["rows"]] == [
        ("full", "drawn"),
        ("frozen", "computed"),
    ]
    assert all(isinstance(row["without to with"], float) for row in record["rows"])
    assert done.count("drawn") == 2
    assert done.count("hash") == 4 + 2 + 2 * 2  # to fuse, once each tower, and without, both in each turn


def test_codec_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's own codec and judge, on two sentences; two sounds to train on."""
    pytest.importorskip("espeakng_loader", reason="needs the extra `demo`")
    given = (tmp_path / "copies.json", "--demo", "--sounds", 2, "--rows", 2, "--steps", 2, "--width", 8)
    run_small("codec_copies.py", monkeypatch, *given)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "copies.json").read_text())
    assert record["rows"] == 2
    assert all(record[name]["wer_95"][0] <= record[name]["wer"] for name in ("originals", "looked_up", "decoded"))


def test_unit_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A Whisper of random weights; one text has more letters than places, and is left out."""
    whisper().save_pretrained(tmp_path / "whisper")
    WhisperFeatureExtractor().save_pretrained(tmp_path / "whisper")
    for split, count in (("train", 4), ("validation", 2)):
        rows = [{"speech": f"{split}-{i}.wav", "text": "a bee" * (1 + 9 * (i == 3))} for i in range(count)]
        for i, row in enumerate(rows):
            write_audio(tmp_path / row["speech"], voice(i, 1.0))
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [
        tmp_path / "spelling.json",
        "--data",
        tmp_path,
        "--source",
        tmp_path / "whisper",
        "--layer",
        2,
        "--units",
        8,
        "--spelling-steps",
        2,
    ]
    run_small("unit_spelling.py", monkeypatch, *given, "--window", 3, "--rows", 4, 2, "--steps", 2)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "spelling.json").read_text())
    assert record["texts"] == [3, 2]
    ways = ["", ", of a projection"]
    assert list(record["rates"]) == [f"{rate}{way}" for rate in ("25", "12.5", "8.3") for way in ways]
    assert all(rate["seeds"][0]["nats_a_letter"] > 0 for rate in record["rates"].values())


def test_rare_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    TextCodec.train(["one two", "two three"] * 9, vocab_size=40).save_pretrained(tmp_path / "text")
    for split, texts in (("train", ["one two"] * 10 + ["three"]), ("test", ["two", "three"])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = ("--data", tmp_path, "--source", tmp_path / "text", "--merges", 0)
    run_small("rare_tokens.py", monkeypatch, tmp_path / "rare.json", *given)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "rare.json").read_text())
    whole, letters = record["rows"]
    assert (whole["merges"], whole["tokens_a_text"], whole["seldom"], whole["never"]) == (None, 1.9, 50.0, 0.0)
    # of t, w, o and a space, and t, h, r, e, e and a space, h and r stand once
    assert (letters["merges"], letters["seldom"], letters["never"]) == (0, 20.0, 0.0)


def test_voices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A random listener, who writes one word of a few letters, has all words wrong, whoever reads."""
    pytest.importorskip("espeakng_loader", reason="needs the extra `demo`")
    given = ("--source", tiny_whisper(tmp_path / "w"), "--variants", "m3", "--languages", "en-us", "en")
    run_small("voices.py", monkeypatch, tmp_path / "voices.json", *given, LONGEST=lambda _: 6)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "voices.json").read_text())
    assert (list(record["variants"]), list(record["languages"])) == (["m3"], ["en-us", "en"])
    for words, letters in (*record["variants"].values(), *record["languages"].values()):
        assert words == 100.0
        assert 80.0 < letters <= 100.0


def test_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Four clients, some of whom do not behave: none is lost or mixed up."""
    pytest.importorskip("fastapi", reason="needs the extra `serve`")
    small = {"SETTINGS": lambda _: {"text": {"max_new_tokens": 4}, "speech": {"max_new_tokens": 30}}}
    small |= {"TEXT": lambda texts: texts[:1], "TURNS": lambda _: 1}
    run_small("serve.py", monkeypatch, tmp_path / "serve.json", "--clients", 4, "--seconds", 3, **small)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "serve.json").read_text())
    together = record["together"]
    assert (together["lost"], together["mixed_up"], record["alive"]) == (0, 0, True), together
    assert sum(together["requests"].values()) >= 4
    assert record["alone"]["first_sound_seconds"]["p50"] > 0
