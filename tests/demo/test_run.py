"""The whole demo at toy size, from nothing, and what it leaves behind."""

import io
import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import soundfile
import torch
from rich.console import Console

from zipper_lm.data.document import Document
from zipper_lm.demo import run as run_module
from zipper_lm.demo.build import ASSETS, fingerprint
from zipper_lm.demo.run import demo
from zipper_lm.demo.sizes import DemoSizes
from zipper_lm.evaluation.preservation import verify
from zipper_lm.evaluation.recogniser import Recogniser
from zipper_lm.fusion.zip_spec import EMBEDDINGS
from zipper_lm.jobs.recipes.reader import to_mapping
from zipper_lm.models.records import weights_digest
from zipper_lm.models.zipper import ZipperModel

PERCENTAGES = (
    "asr_wer",
    "tts_wer",
    "tts_best_wer",
    "oracle_wer",
    "look_up_wer",
    "judge_wer_on_originals",
    "chain_wer",
    "chain_text_wer",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "zipper-demo"
    demo(output, from_scratch=True, sizes=DemoSizes.toy(), console=Console(quiet=True))
    return output


def built(finished: Path) -> Path:
    return finished.with_name("zipper-demo.towers")


def test_writes_what_it_promises(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == {"audio", "model", "report.html", "results.json"}
    assert {p.name for p in finished.parent.iterdir()} == {"zipper-demo", "zipper-demo.towers"}
    sounds = sorted(finished.glob("audio/*.wav"))
    assert len(sounds) == 10
    assert all(soundfile.info(s).samplerate == 16_000 for s in sounds)


def test_results(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for name in PERCENTAGES:
        low, high = results[f"{name}_95"]
        assert 0 <= low <= results[name] <= high
        assert results[name.replace("wer", "cer")] >= 0
    assert results["text_tower_identical"] is True
    assert results["text_tower_tensors"] > 10
    assert results["seconds"] >= sum(results["seconds_by_stage"].values()) - 1
    assert results["test_utterances"] == 4
    assert results["sizes"]["units"] == 32
    assert results["parts_sha256"]["text"] == fingerprint(built(finished) / "text")
    assert {"torch", "transformers", "zipper-lm"} <= set(results["versions"])


def test_it_ends_with_how_to_talk_to_what_it_made(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command as it can be typed: `make demo` has it where no shell looks."""
    results = json.loads((finished / "results.json").read_text())
    for on_path, called, expected in (
        ("/usr/bin/zipper", "/usr/bin/zipper", "zipper"),
        (None, ".venv/bin/zipper", ".venv/bin/zipper"),
    ):
        monkeypatch.setattr(shutil, "which", lambda name, found=on_path: found)
        monkeypatch.setattr(run_module.sys, "argv", [called, "demo"])
        out = io.StringIO()
        run_module._print(Console(file=out, width=60), results, Path("folder/zipper-demo"))
        assert out.getvalue().splitlines()[-1] == f"talk to it: {expected} serve folder/zipper-demo/model"


@pytest.mark.parametrize("terminal", [False, True])
def test_what_it_prints_fits_80_columns(finished: Path, terminal: bool) -> None:
    """Cells of its table were cut into several lines where a terminal has 80 columns."""
    results = json.loads((finished / "results.json").read_text())
    results |= {key: 100.0 for key in results if key.endswith(("_wer", "_cer", "_originals"))}
    results |= {key: [100.0, 100.0] for key in results if key.endswith("_95")}
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=terminal, color_system=None)
    run_module._print(run_module.narrow(console), results, Path("zipper-demo"))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if "100.0 (100.0 to 100.0)" in line]) == 8


def test_the_best_and_the_worst_are_played() -> None:
    """The page played the first sentences, which happened to be good ones."""
    texts = ["one two", "one two", "one two", "one two"]
    read = ["one two", "six", "one", "one two"]
    spoken = ["one tow", "six", "one two", "one two"]
    assert run_module._from_best(texts, read, spoken) == [3, 0, 2, 1]


def test_report_is_well_formed_and_has_its_players_and_pictures(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    doctype, _, rest = text.partition("\n")
    assert doctype == "<!DOCTYPE html>"
    root = ElementTree.fromstring(rest)
    players = [e.attrib["src"] for e in root.iter("audio")]
    assert len(players) == 2 * (4 + 2)
    assert [e.text for e in root.iter("h3") if e.text and e.text.startswith("The ")] == [
        "The best 1",
        "The worst 1",
    ] * 2
    assert all(p.startswith("data:audio/flac;base64,") and len(p) > 200 for p in players)
    assert len([e for e in root.iter() if e.tag.endswith("}svg")]) >= 4  # two maps, losses, gates
    assert "http://" not in text.replace("http://www.w3.org/", "")  # names of XML namespaces, never fetched
    assert "https://" not in text
    assert "<script" not in text


def test_model_loads_and_its_text_tower_is_the_built_one(finished: Path) -> None:
    model = ZipperModel.from_pretrained(finished / "model")
    sound, _ = soundfile.read(min(finished.glob("audio/*-input.wav")), dtype="float32")
    settings = {"text": {"max_new_tokens": 3}, "speech": {"max_new_tokens": 8}}
    said = model.generate([Document([("speech", sound)])], ["text", "speech"], settings=settings)[0]
    assert said.modalities == ["speech", "text", "speech"]
    assert isinstance(said[1].value, str)
    model.config.towers["text"]["source"] = str(built(finished) / "text")
    report = next(r for r in verify(model, finished / "model") if r.name == "text")
    assert report.identical
    with torch.no_grad():
        next(model.tower("text").backbone.parameters()).view(-1)[0] += 1e-3
    report = next(r for r in verify(model, finished / "model") if r.name == "text")
    assert not report.identical


def test_the_model_has_the_record_of_its_run(finished: Path) -> None:
    """The demo trained on a path of its own: fields of the recipe were not handed on, and no record was kept."""
    run = json.loads((finished / "model" / "run.json").read_text())
    assert run["weights"] == weights_digest(finished / "model")
    sizes = DemoSizes.toy()
    assert run["recipe"]["training"] == to_mapping(sizes.fusion)
    assert (run["steps"], run["frozen_unchanged"]) == (sizes.fusion.steps, {"text": True})
    assert json.loads((finished / "model" / "generation.json").read_text()) == sizes.generation
    assert (
        "unknown" not in (finished / "model" / "README.md").read_text().split("## Data and training")[1].split("##")[0]
    )


def test_an_interrupted_demo_goes_on(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It began anew, with the voices, whatever it had done."""
    monkeypatch.setattr(run_module, "ASSETS", built(finished))

    def halt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_score", halt)
        with pytest.raises(KeyboardInterrupt):
            demo(tmp_path / "demo", sizes=DemoSizes.toy(), console=Console(quiet=True))
    assert not (tmp_path / "demo").exists()
    monkeypatch.setattr(run_module, "write_corpus", lambda *_, **__: pytest.fail("spoken again"))
    monkeypatch.setattr(run_module, "fuse", lambda *_, **__: pytest.fail("fused again"))
    results = demo(tmp_path / "demo", sizes=DemoSizes.toy(), console=Console(quiet=True))
    before = json.loads((finished / "results.json").read_text())
    assert [results[name] for name in PERCENTAGES] == [before[name] for name in PERCENTAGES]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_what_is_gone_on_with_is_of_the_same_towers(tmp_path: Path, finished: Path) -> None:
    """A demo that was interrupted went on with a model over towers that had been made anew since, and named these."""
    parts = shutil.copytree(built(finished), tmp_path / "parts")
    before = run_module._work(tmp_path / "demo", DemoSizes.toy(), parts)
    assert run_module._work(tmp_path / "demo", DemoSizes.toy(), parts) == before
    assert run_module._work(tmp_path / "demo", DemoSizes.toy(), built(finished)) != before
    (parts / "text" / "config.json").write_text("{}")
    assert run_module._work(tmp_path / "demo", DemoSizes.toy(), parts) != before


def test_an_existing_folder_is_refused_at_once_and_kept(finished: Path) -> None:
    before = (finished / "results.json").read_bytes()
    with pytest.raises(ValueError, match="exists; add --overwrite"):
        demo(finished, sizes=DemoSizes.toy(), console=Console(quiet=True))
    assert (finished / "results.json").read_bytes() == before


def test_shipped_parts_are_small_and_load() -> None:
    files = [p for p in ASSETS.rglob("*") if p.is_file()]
    assert {p.relative_to(ASSETS).parts[0] for p in files} == {"judge", "text", "speech"}
    assert sum(p.stat().st_size for p in files) <= 12e6
    assert {p.suffix for p in files} <= {".json", ".safetensors"}
    model = ZipperModel.fuse({name: ASSETS / name for name in ("text", "speech")})
    assert model.processor is not None
    assert all(t.backbone.dtype == torch.float32 for t in map(model.tower, model.names))
    made = {p: json.loads((ASSETS / p / "built.json").read_text())["made_with"] for p in ("judge", "text", "speech")}
    assert made["speech"]["units"] == DemoSizes().units == len(model.processor.codecs["speech"].centroids)  # type: ignore[attr-defined]
    assert Recogniser.from_pretrained(ASSETS / "judge").config.characters


def test_the_demo_speaks_from_embeddings_and_hears_from_states(finished: Path) -> None:
    """It spoke wrong words of the right kind: the states of its text tower hardly say which word stands there."""
    model = ZipperModel.from_pretrained(finished / "model")
    assert {source for _, source in model.layer_pairs["speech", "text"]} == {EMBEDDINGS}
    assert EMBEDDINGS not in {source for _, source in model.layer_pairs["text", "speech"]}
