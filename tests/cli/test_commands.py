"""The commands, as users and machines call them."""

from __future__ import annotations

import ast
import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import soundfile
import torch
import yaml
from tiny import tiny_backbone, tiny_model
from tiny_hub import Hub
from tiny_recipes import plain_recipe, tiny_recipe, workshop
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

import zipper_lm
from zipper_lm import ZipperModel, ZipSpec, __version__
from zipper_lm.cli import app
from zipper_lm.cli.common import settings_of
from zipper_lm.cli.verify import told
from zipper_lm.codecs.audio import read_audio
from zipper_lm.evaluation.preservation import TowerReport
from zipper_lm.evaluation.public_recogniser import PublicRecogniser
from zipper_lm.jobs.towers import build_model
from zipper_lm.utils import products, progress

COMMANDS = (
    *("demo", "pretrain", "prepare", "fuse", "generate", "evaluate", "verify", "inspect"),
    *("combine", "export", "push", "corpus", "experiment", "report"),
)


def zipper(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words: object) -> str:
    """The one line that says why."""
    result = zipper(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def answered(*words: object) -> dict[str, Any]:
    """What ``--json`` says: one line, the last, on standard output."""
    result = zipper(*words, "--json")
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh fusion of the tiny towers, with generation settings beside it."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    build_model(tiny_recipe(folder)).save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(tiny_recipe(folder).generation))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command: str) -> None:
    result = zipper(command, "--help")
    assert result.exit_code == 0
    assert f"Example: zipper {command}" in " ".join(result.stdout.split())


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys; from zipper_lm.cli import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *shown, modules = done.stdout.splitlines()
    assert not {"torch", "transformers", "numpy"} & set(modules.split())
    assert all(any(command in line for line in shown) for command in COMMANDS)


def test_what_only_fitting_needs_is_not_waited_for() -> None:
    """Every command that has a codec or scores anything took a second or two to import scikit-learn and scipy.stats."""
    found = set()
    for file in Path(zipper_lm.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {(file.stem, name) for name in names if re.match(r"sklearn|scipy\.stats", name)}
    assert found == {("digit_images", "sklearn.datasets")}  # a corpus, imported when it is made


def test_version() -> None:
    assert zipper("--version").stdout.strip() == f"zipper {__version__}"


def test_the_traceback_only_if_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nowhere.yaml" in refused("fuse", "nowhere.yaml")
    for words in (("fuse", "nowhere.yaml", "--debug"), ("--debug", "fuse", "nowhere.yaml")):
        assert isinstance(zipper(*words).exception, ValueError)
    monkeypatch.setenv("ZIPPER_DEBUG", "1")
    assert isinstance(zipper("fuse", "nowhere.yaml").exception, ValueError)


def test_an_extra_that_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a traceback, from a worker of a process pool."""
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.txt").write_text(f"this is {name}\n")
    said = refused("corpus", "sentences", str(tmp_path / "out"), "--source", str(tmp_path))
    assert "pip install 'zipper-lm[demo]'" in said


def test_settings_are_read_as_recipes_are(model: Path) -> None:
    """``True`` stayed a word, which transformers took for no: greedy search, and nothing said."""
    assert settings_of(str(model), ["text.do_sample=True", "text.top_k=5"])["text"]["do_sample"] is True


def test_prepare_then_fuse(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain_recipe(tmp_path / "m")))
    told = answered("prepare", tmp_path / "recipe.yaml", "--output", tmp_path / "ids")
    assert told["rows"] == {"train": 12, "validation": 4}
    assert (told["broken"], told["output"]) == (0, str(tmp_path / "ids"))
    assert "exists" in refused("prepare", tmp_path / "recipe.yaml", "--output", tmp_path / "ids")
    assert "prepared already" in refused(
        *("prepare", tmp_path / "recipe.yaml", f"data={tmp_path / 'ids'}", "--output", tmp_path / "again")
    )
    assert answered("fuse", tmp_path / "recipe.yaml", f"data={tmp_path / 'ids'}")["steps"] == 2
    assert "holds prepared ids" in refused("evaluate", tmp_path / "m", tmp_path / "ids")


def test_training_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands turn transformers' own notes off, and its progress bars went with them: `zipper fuse`, `pretrain`
    and `experiment` said nothing at all from the first step to the last, however long they took."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    plain = plain_recipe(tmp_path / "model", training={"arguments": {}, "evaluate_every": 1})
    (tmp_path / "fuse.yaml").write_text(yaml.safe_dump(plain))
    result = zipper("fuse", tmp_path / "fuse.yaml")
    assert result.exit_code == 0, result.output
    told = result.stderr.splitlines()
    assert any(line.startswith("fusing 2/2, ") and "/s" in line and "loss" in line for line in told), told
    assert any(line.startswith("step 1: wer/speech->text ") for line in told), told


def test_the_score_told_is_that_of_the_model_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was the least of all, also of tasks that were no longer scored when the run went on."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain_recipe(tmp_path / "m")))
    history = [{"step": step, "eval_wer": wer} for step, wer in ((1, 1.0), (2, 40.0), (3, 50.0))]
    kept = ("seconds", "train_loss", "frozen_unchanged", "signatures", "recipe_hash")
    record = dict.fromkeys(kept) | {"steps": 3, "best_step": 2, "history": history}
    monkeypatch.setattr("zipper_lm.jobs.fuse.fuse", lambda *_, **__: record)
    assert answered("fuse", tmp_path / "recipe.yaml")["wer"] == 40.0


def test_fuse_then_verify(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain_recipe(tmp_path / "m")))
    recipe = tmp_path / "recipe.yaml"
    assert "did you mean" in refused("fuse", recipe, "training.stpes=3")
    assert "nothing to resume" in refused("fuse", recipe, "--resume")
    result = answered("fuse", recipe, "training.steps=1")
    assert result["steps"] == 1
    assert {"wer", "wer/speech->text", "wer/text->speech"} <= set(result)
    assert "exists" in refused("fuse", recipe)
    reports = answered("verify", tmp_path / "m")
    assert reports["identical"]
    assert reports["towers"]["text"]["identical"]
    assert reports["towers"]["speech"]["train"] == "full"
    shown = " ".join(zipper("verify", tmp_path / "m").stderr.split())
    assert f"all {reports['towers']['text']['tensors']} tensors bit-identical" in shown
    assert "speech" in shown
    assert ": trained;" in shown


def test_verify_says_that_a_source_changed(tmp_path: Path) -> None:
    for name in ("text", "speech"):
        tiny_backbone("llama", 31, 2).save_pretrained(tmp_path / name)
    from zipper_lm import ZipperModel

    ZipperModel.fuse({n: str(tmp_path / n) for n in ("text", "speech")}).save_pretrained(tmp_path / "m")
    assert answered("verify", tmp_path / "m")["identical"]
    tiny_backbone("llama", 31, 2, seed=1).save_pretrained(tmp_path / "text")
    result = zipper("verify", tmp_path / "m", "--json")
    assert result.exit_code == 1
    assert list(json.loads(result.stdout)["changed"]) == ["text"]
    assert "nowhere" in refused("verify", tmp_path / "nowhere")


def test_verify_says_that_the_source_is_another() -> None:
    """As tower and source do, which come from one file, when that is no longer what it was."""
    report = TowerReport("text", "frozen", "org/text", 9, 9, 0.0, logits_equal=True, source_as_fused=False)
    assert not report.identical
    assert told(report) == "text (org/text): frozen, but the source is no longer what the zips were made with"


def test_pretrain(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = {"data": str(workshop() / "data"), "modality": "text", "backbone": shape, "output": str(tmp_path / "t")}
    recipe |= {"codec": {"kind": "text", "options": {"vocab_size": 32}}, "training": {"steps": 1, "batch_size": 2}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert answered("pretrain", tmp_path / "r.yaml")["perplexity"] > 1
    assert (tmp_path / "t" / "codec.json").is_file()
    assert "exists" in refused("pretrain", tmp_path / "r.yaml")


def test_text_in_speech_out(model: Path, tmp_path: Path) -> None:
    words = ("generate", model, "--input", "text:one six", "--output", f"speech:{tmp_path / 'out.wav'}")
    result = answered(*words, "--set", "speech.min_new_tokens=4")
    given, written = result["document"]
    assert given == {"modality": "text", "given": True, "tokens": given["tokens"], "value": "one six"}
    assert written["file"] == str(tmp_path / "out.wav")
    assert 4 <= written["tokens"] <= 8
    assert len(read_audio(tmp_path / "out.wav"))
    assert "exists" in refused(*words)
    assert zipper(*words, "--set", "speech.min_new_tokens=4", "--overwrite").exit_code == 0


def test_a_chain_in_the_order_of_the_command_line(model: Path, tmp_path: Path) -> None:
    sound = workshop() / "data" / "test" / "0.wav"
    ask = ("generate", model, "--input", f"speech:{sound}", "--output", "text", "--input", "text:one")
    result = answered(*ask, "--output", f"speech:{tmp_path / 'a.wav'}", "--set", "speech.min_new_tokens=4")
    assert [(s["modality"], s["given"]) for s in result["document"]] == [
        ("speech", True),
        ("text", False),
        ("text", True),
        ("speech", False),
    ]
    assert result["document"][2]["value"] == "one"


def test_streamed_text_is_the_text(model: Path) -> None:
    words = ("generate", model, "--input", f"speech:{workshop() / 'data' / 'test' / '0.wav'}", "--output", "text")
    plain = zipper(*words).stdout
    assert zipper(*words, "--stream").stdout.strip() == plain.strip()
    sampled = ("--set", "text.do_sample=true", "--seed", 1)
    assert zipper(*words, *sampled).stdout == zipper(*words, *sampled).stdout


def test_an_automatic_schedule(model: Path) -> None:
    result = answered("generate", model, "--input", "text:one", "--schedule", "auto")
    assert result["document"][0]["given"]
    assert not any(s["given"] for s in result["document"][1:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--input", "three"), "modality:value"),
        (("--input", "speech:none.wav", "--output", "text"), "none.wav"),
        (("--input", "text:one"), "nothing to write"),
        (("--input", "text:one", "--output", "speech"), "needs a file"),
        (("--input", "text:one", "--output", "speech:out.mp3"), ".wav or .flac"),
        (("--input", "smell:rose", "--output", "text"), "smell"),
        (("--input", "text:one", "--output", "smell"), "smell"),
        (("--input", "text:ω", "--output", "text"), "ω"),
        (("--output", "text", "--set", "text.temprature=1"), "temprature"),
        (("--output", "text", "--set", "temperature=1"), "modality.name=value"),
        (("--output", "text", "--schedule", "text"), "auto"),
        (("--output", "speech:a.wav", "--output", "speech:a.wav"), "twice"),
    ],
)
def test_what_generate_refuses(words: Sequence[str], message: str, model: Path, tmp_path: Path) -> None:
    assert message in refused("generate", model, *words)


def test_another_dtype(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An LLM that is published in bfloat16 was written with in bfloat16, also where a processor has nothing for it:
    only Python could ask for another dtype, and nothing said that it would be quicker."""
    monkeypatch.setattr(products, "is_multiplied_here", lambda dtype: dtype != torch.bfloat16)
    words = ("generate", model, "--input", "text:one", "--output", "text")
    assert "multiplies" not in zipper(*words).stderr
    told = zipper(*words, "--dtype", "bfloat16")
    assert told.exit_code == 0, told.output
    line = " ".join(told.stderr.split())
    assert re.search(r"\btext is in bfloat16, which this processor multiplies .*--dtype float32", line), told.stderr
    shutil.copytree(model, other := model.with_name("in-another-dtype"))
    data = (other, workshop() / "data", "--limit", 2)
    for dtype in ((), ("--dtype", "float16")):
        answered("evaluate", *data, *dtype)
    kept = json.loads((other / "results.json").read_text())
    assert [entry.get("dtype") for entry in kept if entry["limit"] == 2] == [None, "float16"]
    wrong = zipper("generate", model, "--output", "text", "--dtype", "int8")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "int8" in wrong.stderr


def test_evaluate_reading(model: Path) -> None:
    result = answered("evaluate", model, workshop() / "data", "--task", "asr", "--limit", 3)
    assert (result["task"], result["utterances"]) == ("asr", 3)
    assert {"wer", "cer", "wer_95", "seconds"} <= set(result)
    assert "WER" in zipper("evaluate", model, workshop() / "data", "--limit", 1).stdout
    assert answered("evaluate", model, workshop() / "data", "--where", "speaker=odd")["utterances"] == 2
    one = answered("evaluate", model, workshop() / "data", "--where", "speaker=odd", "--limit", 1)
    assert one["utterances"] == 1, "the limit was taken first, and left no row of that speaker"


def test_evaluate_leaves_out_rows_without_words(model: Path, tmp_path: Path) -> None:
    """One silent recording in a test split was an error, where `zipper fuse` leaves it out and says so."""
    data = shutil.copytree(workshop() / "data", tmp_path / "data")
    table = data / "test" / "metadata.csv"
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    silent = {**rows[1], "transcription": " ... "}

    def write(*given: dict[str, str]) -> None:
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(given)

    write(rows[0], silent, *rows[2:])
    asked = ("evaluate", model, data, "--task")
    for task in (("asr",), ("tts", "--judge", workshop() / "judge")):
        result = zipper(*asked, *task, "--json")
        assert "1 rows have no words in their text, so they are not scored" in " ".join(result.stderr.split())
        told = json.loads(result.stdout)
        assert (told["utterances"], told["not_scored"]) == (3, 1)
    write(silent, silent)
    assert "none of 2 rows has anything to compare with" in refused(*asked, "asr")


def test_evaluate_keeps_its_results_beside_the_model(model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(model, mine, ignore=shutil.ignore_patterns("results.json"))  # other tests evaluate it too
    data = workshop() / "data"
    for words in (("--limit", 1), (), ("--task", "tts", "--judge", workshop() / "judge"), ()):
        answered("evaluate", mine, data, *words)
    kept = json.loads((mine / "results.json").read_text())
    assert [(e["task"], e["utterances"], e["data"]) for e in kept] == [
        ("asr", 1, str(data)),
        ("tts", 4, str(data)),
        ("asr", 4, str(data)),
    ]
    card = (mine / "README.md").read_text()
    assert card.count("`data`, split `test`") == 3
    assert "by an independent judge (originals: WER" in card
    (mine / "README.md").write_text("my own words")
    answered("evaluate", mine, data, "--limit", 2)
    assert (mine / "README.md").read_text() == "my own words"
    (mine / "results.json").write_text("{")
    assert "results.json" in refused("evaluate", mine, data)


def test_evaluate_asks_what_is_forgotten(model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(model, mine, ignore=shutil.ignore_patterns("results.json"))
    (tmp_path / "q.jsonl").write_text('{"text": "one two"}\n{"text": "six"}\n')
    asked = ("evaluate", mine, workshop() / "data", "--task", "forgetting", "--questions", tmp_path / "q.jsonl")
    told = answered(*asked)
    assert (told["questions"], told["same_answers"], told["changed"]) == (2, 2, [])
    assert told["before"] == told["after"]
    assert "answers that stay the same: 2 of 2" in zipper(*asked).stdout
    assert "2 of 2 plain questions the answer that it gave before" in (mine / "README.md").read_text()
    assert "--judge has no effect" in refused(*asked, "--judge", "x")
    assert "--questions has no effect" in refused(*asked[:3], "--questions", "x")
    assert "the tokenizer lacks" in refused(*asked[:5])


def test_push(model: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "t")
    result = answered("push", model, "me/spoken", "--private", "--revision", "v1")
    shared = hub.root / "me/spoken"
    assert result["files"] == {p.relative_to(shared).as_posix(): p.stat().st_size for p in files(shared)}
    assert {"README.md", "architecture.png", "generation.json", "towers/text/model.safetensors"} <= set(result["files"])
    assert result["towers"]["text"].startswith("bundled")
    assert result["url"].startswith("https://huggingface.co/me/spoken/commit/")
    assert hub.calls["create_repo"]["private"]
    assert hub.calls["upload_folder"]["revision"] == "v1"
    assert answered("generate", shared, "--input", "text:one", "--output", "text")["document"]
    assert answered("verify", shared)["identical"]
    shown = zipper("push", model, "me/spoken", "--create-pr").stderr
    assert "model.safetensors" in shown
    assert "tower text: bundled" in shown
    assert hub.calls["upload_folder"]["create_pr"]


def test_what_push_refuses(model: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipper_lm.models.sharing.get_token", lambda: None)
    assert "no token here" in refused("push", model, "me/spoken")
    monkeypatch.setattr("zipper_lm.models.sharing.get_token", lambda: "t")
    assert "'spoken' has no owner" in refused("push", model, "spoken")
    assert "alphanumeric" in refused("push", model, "me/spoken digits")
    assert "nowhere" in refused("push", tmp_path / "nowhere", "me/spoken")
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    config = json.loads((damaged / "config.json").read_text())
    config["zips"][0]["positions"] = "none"
    (damaged / "config.json").write_text(json.dumps(config))
    assert "config.json was changed" in refused("push", damaged, "me/spoken")
    (damaged / "model.safetensors").unlink()
    assert "cannot be read" in refused("push", damaged, "me/spoken")
    assert not hub.calls
    assert not hub.root.exists()


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()]


def test_evaluate_speaking(model: Path, tmp_path: Path) -> None:
    words = ("evaluate", model, workshop() / "data", "--task", "tts", "--judge", workshop() / "judge")
    result = answered(*words, "--output", tmp_path / "said")
    assert {"wer", "judge_wer_on_originals", "oracle_wer"} <= set(result)
    with (tmp_path / "said" / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file_name", "transcription", "heard"]
    assert len(rows) == result["utterances"] == 4
    assert all(soundfile.info(tmp_path / "said" / row["file_name"]).samplerate == 16_000 for row in rows)
    assert "exists" in refused(*words, "--output", tmp_path / "said")


@pytest.mark.parametrize("fetched", [False, True])
def test_a_judge_on_the_hub(fetched: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that had been fetched was taken for a data set where the Hub cannot be reached."""
    asked: list[str] = []

    class Heard:
        def transcribe(self, values: Sequence[Any]) -> list[str]:
            return ["one"] * len(values)

        def digest(self) -> str:
            return "0"

    def on_the_hub(name: str, repo_type: str) -> bool:
        if fetched:
            raise huggingface_hub.errors.OfflineModeIsEnabled
        return repo_type == "model"

    if fetched:
        kept = tmp_path / "models--someone--whisper"
        for file, text in (("refs/main", "c0ffee"), ("snapshots/c0ffee/config.json", "{}")):
            (kept / file).parent.mkdir(parents=True)
            (kept / file).write_text(text)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "repo_exists", on_the_hub)
    monkeypatch.setattr(PublicRecogniser, "from_pretrained", lambda source: asked.append(source) or Heard())
    result = answered("evaluate", model, workshop() / "data", "--task", "tts", "--judge", "someone/whisper")
    assert asked == ["someone/whisper"]
    assert result["utterances"] == 4


def test_what_evaluate_refuses(model: Path, tmp_path: Path) -> None:
    data = workshop() / "data"
    assert "text only" in refused("evaluate", model, data, "--output", tmp_path / "x")
    assert "text only" in refused("evaluate", model, data, "--judge", workshop() / "judge")
    assert "arrow" in refused("evaluate", model, data, "--task", "stt")
    assert "unknown modality 'image'" in refused("evaluate", model, data, "--task", "image->speech")  # no judge first
    assert "['even', 'odd']" in refused("evaluate", model, data, "--where", "speaker=theo")
    assert "columns are" in refused("evaluate", model, data, "--where", "voice=theo")
    assert "columns are" in refused("evaluate", model, data, "--where", "speaker")
    assert "no split 'dev2'" in refused("evaluate", model, data, "--split", "dev2")
    assert "--limit must be" in refused("evaluate", model, data, "--limit", 0)


def test_evaluate_data_whose_columns_have_other_names(model: Path, tmp_path: Path) -> None:
    """A model that was fused with ``data.columns`` could not be scored on its own data."""
    table = shutil.copytree(workshop() / "data", tmp_path / "data") / "test" / "metadata.csv"
    head, _, rows = table.read_text(encoding="utf-8").partition("\n")
    assert "transcription" in head
    table.write_text(head.replace("transcription", "words") + "\n" + rows, encoding="utf-8")
    assert "'words'" in refused("evaluate", model, tmp_path / "data")
    named = answered("evaluate", model, tmp_path / "data", "--column", "text=words")
    assert named["wer"] == answered("evaluate", model, workshop() / "data")["wer"]
    assert "MODALITY=NAME" in refused("evaluate", model, tmp_path / "data", "--column", "words")


def test_evaluate_replaces_nothing_that_it_reads(model: Path, tmp_path: Path) -> None:
    """``--output`` with ``--overwrite`` took the place of the data set, the model or the judge."""
    parts = {"the model": model, "the data": workshop() / "data", "the judge": workshop() / "judge"}
    mine = {what: shutil.copytree(part, tmp_path / what) for what, part in parts.items()}
    words = (mine["the model"], mine["the data"], "--task", "tts", "--judge", mine["the judge"], "--overwrite")
    for what, part in mine.items():
        assert f"would replace {what}" in " ".join(refused("evaluate", *words, "--output", part).split())
        assert any(part.iterdir())
    split = mine["the data"] / "train"
    assert "would replace the data" in " ".join(refused("evaluate", *words, "--output", split).split())
    for _ in range(2):  # what it wrote itself it may replace, there too
        assert zipper("evaluate", *words, "--output", mine["the model"] / "heard").exit_code == 0


def test_best_of(model: Path, tmp_path: Path) -> None:
    said = ("--input", "text:one two", "--output", f"speech:{tmp_path / 'out.wav'}", "--overwrite")
    said += ("--set", "speech.min_new_tokens=4")
    for more in ((), ("--judge", workshop() / "judge")):
        (_, written) = answered("generate", model, *said, "--best-of", 3, *more)["document"]
        assert len(written["candidates"]) == 3
        scores = [c["log_probability"] for c in written["candidates"]]
        assert written["log_probability"] in (scores if more else [max(scores)])
        assert (tmp_path / "out.wav").is_file()
    scored = ("evaluate", model, workshop() / "data", "--task", "tts", "--judge", workshop() / "judge", "--limit", 2)
    assert answered(*scored, "--best-of", 2, "--best-by", "judge")["utterances"] == 2
    assert "--judge chooses among samples" in refused("generate", model, *said, "--judge", "x")
    assert "cannot be streamed" in refused("generate", model, *said, "--best-of", 2, "--stream")
    assert "best_by must be one of" in refused(*scored, "--best-by", "luck")


def test_generate_by_an_engine(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text; here without a compiler, where the step runs as it is."""

    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch.compile", lambda *_, **__: no_compiler)
    said = ("--input", "text:one two", "--output", f"speech:{tmp_path / 'out.wav'}", "--overwrite")
    said += ("--set", "speech.max_new_tokens=12", "--set", "speech.min_new_tokens=4")
    said += ("--set", "speech.do_sample=true", "--set", "speech.seed=3", "--best-of", 2)
    by_engine, plain = (answered("generate", model, *said, *more)["document"][1] for more in (("--compile",), ()))
    assert by_engine["tokens"] == plain["tokens"]
    assert [c["log_probability"] for c in by_engine["candidates"]] == pytest.approx(
        [c["log_probability"] for c in plain["candidates"]], abs=0.002
    )
    assert "leave out --compile" in refused("generate", model, *said[:5], "--compile", "--stream")


def test_commands_on_a_single_decoder(tmp_path: Path) -> None:
    here = workshop()
    towers = {"text": str(here / "text"), "speech": str(here / "speech")}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(plain_recipe(tmp_path / "m", towers=towers, architecture="single-decoder")))
    zipper("fuse", recipe)
    assert answered("evaluate", tmp_path / "m", here / "data", "--task", "asr")["utterances"] == 4
    said = ("--input", "text:one two", "--output", f"speech:{tmp_path / 'out.wav'}")
    assert answered("generate", tmp_path / "m", *said)["document"][1]["modality"] == "speech"
    assert (tmp_path / "out.wav").is_file()
    assert "no towers and no zips" in refused("verify", tmp_path / "m")
    assert "no towers and no zips" in refused("inspect", tmp_path / "m")
    words = ("generate", tmp_path / "m", "--input", "text:one", "--output", "text")
    assert zipper(*words, "--stream").stdout == zipper(*words).stdout


def test_export(model: Path, tmp_path: Path) -> None:
    said = answered("export", model, "--tower", "text", "--output", tmp_path / "out")
    assert said == {"output": str(tmp_path / "out"), "tower": "text", "architecture": "LlamaForCausalLM"}
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    backbone = ZipperModel.from_pretrained(model).tower("text").backbone
    assert all(torch.equal(v, backbone.state_dict()[k]) for k, v in alone.state_dict().items())
    assert (tmp_path / "out" / "codec.json").is_file()
    assert "exists" in refused("export", model, "--tower", "text", "--output", tmp_path / "out")
    assert zipper("export", model, "--tower", "text", "--output", tmp_path / "out", "--overwrite").exit_code == 0
    assert "--tower NAME is needed" in refused("export", model, "--output", tmp_path / "two")
    assert "unknown tower 'smell'" in refused("export", model, "--tower", "smell", "--output", tmp_path / "two")
    assert "would replace model" in refused("export", model, "--tower", "text", "--output", model, "--overwrite")
    assert not (tmp_path / "two").exists()


def test_inspect(model: Path) -> None:
    facts = answered("inspect", model)
    parameters = facts["parameters"]
    assert parameters["new"] + parameters["trained"] + parameters["frozen"] == parameters["total"]
    assert facts["towers"]["text"]["trained"] == facts["towers"]["speech"]["frozen"] == 0
    assert {(z["reader"], z["source"]) for z in facts["zips"]} == {("text", "speech"), ("speech", "text")}
    assert all(len(z["layers"]) == len(z["gates"]) == 2 for z in facts["zips"])
    costs = facts["towers"]["text"]["cost"]["zips_at_memory"]
    assert costs["1000"] > costs["100"] > 0
    assert facts["towers"]["text"]["goes_on"] == "by several tokens"
    assert facts["towers"]["text"]["faults"] == []
    shown = zipper("inspect", model).stdout
    assert "goes on by several tokens" in shown
    assert "reads speech" in shown
    assert "gate +0.09" in shown


def test_inspect_names_embeddings(tmp_path: Path) -> None:
    tiny_model(zips=ZipSpec(layers=2, source_layers="embeddings")).save_pretrained(tmp_path / "m")
    assert "layer 1 <- embeddings, gate" in zipper("inspect", tmp_path / "m").stdout


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "MODEL", "--output", "text"),
        ("evaluate", "MODEL", "DATA"),
        ("verify", "MODEL"),
        ("inspect", "MODEL"),
        ("combine", "MODEL", "MODEL", "--output", "OUTPUT"),
        ("push", "MODEL", "owner/name"),
    ],
    ids=lambda words: words[0],
)
def test_code_of_towers_runs_only_when_the_command_says_so(
    words: Sequence[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was no way to say it on the command line; the config.json of a folder said it."""
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["towers"]["text"]["trust_remote_code"] = True
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    places = {"MODEL": tmp_path / "model", "DATA": workshop() / "data", "OUTPUT": tmp_path / "output"}
    called = [str(places.get(word, word)) for word in words]
    monkeypatch.setattr("zipper_lm.models.sharing.check_target", lambda *_: None)
    assert "pass trust_remote_code=True (--trust-remote-code on the command line)" in refused(*called)
    result = zipper(*called, "--trust-remote-code")
    assert "trust" not in result.output
    assert not isinstance(result.exception, AttributeError | TypeError | NameError)
