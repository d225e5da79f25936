"""Pseudo-labels: what a first model writes beside what is known, and what the next one learns from."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from tiny_recipes import plain_recipe, say, tiny_recipe, workshop

from zipper_lm import ZipperModel
from zipper_lm.codecs.codec import load_codec
from zipper_lm.data.broken import Broken
from zipper_lm.data.collation import IGNORED, collate
from zipper_lm.data.document import Segment
from zipper_lm.data.encoding import Joined
from zipper_lm.data.tasks import parse_task
from zipper_lm.jobs import pseudo_labels as module
from zipper_lm.jobs import towers as towers_module
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.prepare import prepare
from zipper_lm.jobs.pseudo_labels import (
    check_labeller,
    label,
    labeller_recipe,
    mixed,
    open_unlabelled,
    read_labels,
    write_labels,
)
from zipper_lm.jobs.recipes.checks import check_recipe, check_sources
from zipper_lm.jobs.recipes.reader import build
from zipper_lm.jobs.recipes.schema import FuseRecipe, PretrainRecipe, PseudoLabelsRecipe, TowerRecipe
from zipper_lm.jobs.rows import DataSource
from zipper_lm.training.callbacks import Interrupted
from zipper_lm.training.trainer import ZipperTrainer

TASK = "speech->text"


def recipe(tmp_path: Path, data: dict[str, Any] | None = None, **wanted: Any) -> FuseRecipe:
    wanted = {"task": TASK, "model": str(tmp_path / "first"), **wanted}
    source = {"source": str(workshop() / "data"), "limit": 3, "validation_limit": 2, **(data or {})}
    return tiny_recipe(tmp_path / "model", pseudo_labels=wanted, data=source)


class Labeller:
    """Writes the text that it is told, row by row; what it is surest of is said too."""

    def __init__(self, model: ZipperModel, texts: list[str]) -> None:
        self.model, self.texts, self.processor, self.specials = model, iter(texts), model.processor, model.specials

    def generate(self, documents: Any, schedule: Any, **kwargs: Any) -> Any:
        assert schedule == ["text"]
        assert kwargs["decode"]
        for document in documents:
            text = next(self.texts)
            ids = load_codec(workshop() / "text").encode([text])[0]
            document.segments.append(Segment("text", value=text, ids=ids))
        return documents


@pytest.fixture(scope="module")
def model() -> ZipperModel:
    return ZipperModel.fuse({name: str(workshop() / name) for name in ("text", "speech")})


def test_the_first_model_is_made_without_pseudo_labels(tmp_path: Path) -> None:
    wanted = recipe(tmp_path, rounds=3)
    third = labeller_recipe(wanted)
    assert third.output == str(tmp_path / "first")
    assert third.pseudo_labels is not None
    second = labeller_recipe(third)
    first = labeller_recipe(second)
    assert labeller_recipe(recipe(tmp_path, rounds=2, model="a/b/")).pseudo_labels.model == "a/b-before"  # type: ignore[union-attr]
    assert (third.pseudo_labels.rounds, second.output) == (2, str(tmp_path / "first-before"))
    assert (first.pseudo_labels, first.output) == (None, str(tmp_path / "first-before-before"))
    assert first.data == wanted.data
    assert first.training == wanted.training
    assert (wanted.scored, first.scored) == (None, ["speech->text"])
    assert labeller_recipe(recipe(tmp_path, task="speech->speech")).scored is None, "not a task that is learned"
    shorter = labeller_recipe(recipe(tmp_path, rounds=2, steps=7))
    assert (shorter.training.steps, labeller_recipe(shorter).training.steps) == (7, 7)
    with pytest.raises(ValueError, match="has none"):
        labeller_recipe(first)


def test_from_pairs_to_a_model_that_learned_from_all_the_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pairs; the other nine recordings have no text here that anybody reads."""
    seen: list[tuple[int, int]] = []
    real = module.mixed

    def noted(aligned: Any, labelled: Any, share: Any) -> Any:
        seen.append((len(aligned), len(labelled)))
        return real(aligned, labelled, share)

    monkeypatch.setattr("zipper_lm.jobs.materials.mixed", noted)
    record = fuse(recipe(tmp_path))
    assert record["frozen_unchanged"] == {"text": True}
    first = json.loads((tmp_path / "first" / "run.json").read_text())
    assert first["recipe"]["pseudo_labels"] is None
    ((pairs, labelled),) = seen
    assert pairs == first["data"]["rows"]["train"] == record["data"]["rows"]["train"] == 3
    assert labelled == record["data"]["pseudo_labels"]
    assert f"{labelled} further rows of `speech->text`" in (tmp_path / "model" / "README.md").read_text()
    shutil.rmtree(tmp_path / "model")
    written = (tmp_path / "first" / "run.json").stat().st_mtime_ns
    again = fuse(recipe(tmp_path))
    assert (tmp_path / "first" / "run.json").stat().st_mtime_ns == written, "what is there is not made anew"
    assert again["train_loss"] == record["train_loss"]


def test_an_interrupted_first_model_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ZipperTrainer.training_step
    stopped: list[int] = []

    def training_step(self: ZipperTrainer, *args: Any, **kwargs: Any) -> Any:
        if not stopped:
            stopped.append(self.state.global_step)
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    wanted = recipe(tmp_path, rounds=2)
    with monkeypatch.context() as patch:
        patch.setattr(ZipperTrainer, "training_step", training_step)
        with pytest.raises(Interrupted):
            fuse(wanted)
    assert not (tmp_path / "first-before").exists()
    with pytest.raises(ValueError, match="interrupted run"):
        fuse(wanted)
    fuse(wanted, resume=True)
    assert all((tmp_path / name / "run.json").is_file() for name in ("first-before", "first", "model"))


def test_only_what_is_given_is_read(tmp_path: Path, model: ZipperModel) -> None:
    """A recording without any text is labelled too, and the text of one that has it is not looked at."""
    (tmp_path / "sound" / "train").mkdir(parents=True)
    for name in ("a", "b"):
        soundfile.write(tmp_path / "sound" / "train" / f"{name}.wav", say("one two"), 16_000)
    (tmp_path / "sound" / "train" / "metadata.csv").write_text("file_name,transcription\na.wav,\nb.wav,one\n")
    wanted = recipe(tmp_path, source=str(tmp_path / "sound"))
    task, rows, _ = open_unlabelled(wanted)
    assert wanted.pseudo_labels is not None
    made = label(Labeller(model, ["six", "two"]), model, task, rows, wanted.pseudo_labels, {}, Broken())  # type: ignore[arg-type]
    assert [row["text"].value for row in made] == ["six", "two"]
    assert made[0]["speech"].ids == model.processor.codecs["speech"].encode([say("one two")])[0]  # type: ignore[union-attr]


def test_rows_for_which_nothing_was_written_are_left_out(tmp_path: Path, model: ZipperModel) -> None:
    wanted = recipe(tmp_path, limit=3)
    task, rows, _ = open_unlabelled(wanted)
    assert wanted.pseudo_labels is not None
    assert len(rows) == 3
    made = label(Labeller(model, ["six", "", "two"]), model, task, rows, wanted.pseudo_labels, {}, Broken())  # type: ignore[arg-type]
    assert [row["text"].value for row in made] == ["six", "two"]
    with pytest.raises(ValueError, match="wrote nothing for any of 3 rows"):
        label(Labeller(model, [""] * 3), model, task, rows, wanted.pseudo_labels, {}, Broken())  # type: ignore[arg-type]


def test_the_surest_are_kept_in_their_order(
    tmp_path: Path, model: ZipperModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(tmp_path, limit=4, keep=0.5)
    task, rows, _ = open_unlabelled(wanted)
    assert wanted.pseudo_labels is not None
    losses = {"one": 3.0, "two": 0.5, "six": 9.0, "six six": 0.1}
    monkeypatch.setattr(module, "_loss", lambda _, document: losses[document[-1].value])
    texts = ["one", "two", "six", "six six"]
    made = label(Labeller(model, texts), model, task, rows, wanted.pseudo_labels, {}, Broken())  # type: ignore[arg-type]
    assert [row["text"].value for row in made] == ["two", "six six"]


def test_the_loss_is_that_of_what_was_written(model: ZipperModel) -> None:
    row = {"speech": Segment("speech", ids=[5, 6]), "text": Segment("text", ids=[6, 7, 8])}
    document = module.build_document(parse_task(TASK), row)
    batch = collate([document], model.specials)
    labels = batch["text"]["labels"][0].tolist()
    with torch.no_grad():
        logits = model(batch).logits["text"][0]
    surprise = [-logits[i - 1].log_softmax(-1)[t].item() for i, t in enumerate(labels) if t != IGNORED]
    assert len(surprise) == 4, "three tokens and the end"
    assert module._loss(model, document) == pytest.approx(sum(surprise) / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("share", "pairs", "labelled"), [(None, 1, 1), (0.5, 5, 1), (0.8, 1, 1), (0.05, 95, 1), (0.9, 1, 2), (0.95, 1, 4)]
)
def test_whichever_are_too_few_are_repeated(share: float | None, pairs: int, labelled: int) -> None:
    rows = mixed(["a", "b"], list(range(10)), share)
    assert isinstance(rows, Joined)
    assert [r for r in rows if isinstance(r, str)] == ["a", "b"] * pairs
    assert [r for r in rows if isinstance(r, int)] == list(range(10)) * labelled


def test_another_codec_is_refused(tmp_path: Path, model: ZipperModel) -> None:
    towers = {name: str(workshop() / name) for name in ("text", "speech")}
    other = type(model.processor.codecs["speech"]).fit([say("one")], units=4)  # type: ignore[union-attr]
    stranger = ZipperModel.fuse(towers, codecs={"speech": other}, train={"speech": "full"})
    with pytest.raises(ValueError, match="another codec of 'speech'"):
        check_labeller(stranger, model, parse_task(TASK), DataSource(recipe(tmp_path).data))
    check_labeller(model, model, parse_task(TASK), DataSource(recipe(tmp_path).data))
    bare = ZipperModel.fuse(towers)
    bare.processor = None
    with pytest.raises(ValueError, match="another codec of 'speech'"):
        check_labeller(bare, model, parse_task(TASK), DataSource(recipe(tmp_path).data))


def test_prepared_rows_of_another_codec_are_refused(tmp_path: Path, model: ZipperModel) -> None:
    """Ids that were made with another codec were taken as they are, and mean something else."""
    prepare(tiny_recipe(tmp_path / "unused"), tmp_path / "prepared")
    wanted = recipe(tmp_path, source=str(tmp_path / "prepared"))
    task, rows, source = open_unlabelled(wanted)
    check_labeller(model, model, task, source)
    assert wanted.pseudo_labels is not None
    texts = ["six"] * len(rows)  # type: ignore[arg-type]
    made = label(Labeller(model, texts), model, task, rows, wanted.pseudo_labels, {}, Broken())  # type: ignore[arg-type]
    assert {row["text"].value for row in made} == {"six"}
    other = type(model.processor.codecs["speech"]).fit([say("one")], units=4)  # type: ignore[union-attr]
    towers = {n: str(workshop() / n) for n in ("text", "speech")}
    stranger = ZipperModel.fuse(towers, codecs={"speech": other}, train={"speech": "full"})
    with pytest.raises(ValueError, match="prepared with another codec of 'speech'"):
        check_labeller(stranger, stranger, task, source)


def test_labels_are_kept_for_a_run_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written anew may differ, on another device, and the run would go on with other rows."""
    rows = [{"speech": Segment("speech", ids=[5, 6]), "text": Segment("text", value="a b", ids=[7])}]
    write_labels(tmp_path, rows)
    assert read_labels(tmp_path) == rows
    with pytest.raises(ValueError, match="is gone"):
        read_labels(tmp_path / "nowhere")
    fuse(recipe(tmp_path / "whole"))
    real = ZipperTrainer.training_step

    def training_step(self: ZipperTrainer, *args: Any, **kwargs: Any) -> Any:
        if Path(self.args.output_dir).name == "model.training" and self.state.global_step == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ZipperTrainer, "training_step", training_step)
        with pytest.raises(Interrupted):
            fuse(recipe(tmp_path))
    assert read_labels(tmp_path / "model.training")
    monkeypatch.setattr("zipper_lm.jobs.materials.label", lambda *_: pytest.fail("labels are there"))
    fuse(recipe(tmp_path), resume=True)
    runs = [json.loads((tmp_path / f / "run.json").read_text()) for f in ("whole/model", "model")]
    losses = [[entry["loss"] for entry in run["history"] if "loss" in entry] for run in runs]
    assert losses[0] == losses[1]
    assert runs[1]["data"]["rows"]["train"] == 3
    assert runs[1]["data"]["pseudo_labels"] == runs[0]["data"]["pseudo_labels"] > 0


def test_resume_between_the_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while labels were written left nothing that `--resume` would have gone on with."""
    with monkeypatch.context() as patch:
        patch.setattr("zipper_lm.jobs.materials.label", lambda *_: pytest.fail("stopped here"))
        with pytest.raises(pytest.fail.Exception):
            fuse(recipe(tmp_path))
    assert (tmp_path / "first").is_dir()
    fuse(recipe(tmp_path), resume=True)
    assert (tmp_path / "model").is_dir()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"task": "speech"}, "has no arrow"),
        ({"task": "->text"}, "gives nothing"),
        ({"task": "speech->video"}, "unknown modality 'video'"),
        ({"model": ""}, "pseudo_labels.model: name the folder"),
        ({"source": "/nowhere"}, "/nowhere"),
        ({"task": "text->text"}, "names a modality twice"),
        ({"task": "speech->text->speech"}, "names a modality twice"),  # the written sound took the real one's place
        ({"columns": {"speech": "wave"}}, "columns=.* has no effect without pseudo_labels.source"),
        ({"train": "nowhere"}, "nowhere"),
    ],
)
def test_found_before_any_work(wanted: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Hours of the first model's fusion come before the labels."""
    with pytest.raises(ValueError, match=message):
        fuse(recipe(tmp_path, **wanted))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "one"}, r"have no \['speech'\], only \['text'\]"),
        ({"segments": [{"modality": "text", "value": "one", "target": True}]}, "holds whole documents"),
    ],
)
def test_a_source_that_cannot_serve_is_found_before_any_work(
    line: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=message):
        fuse(recipe(tmp_path / "out", source=str(tmp_path / "rows.jsonl")))
    assert not (tmp_path / "out").exists()


def test_only_what_is_known_has_to_be_there(tmp_path: Path) -> None:
    """A line whose text is null was refused, though nobody reads it. What `data.exclude` names need not be there."""
    lines = [{"audio": str(workshop() / "data" / "train" / f"{n}.wav"), "text": None} for n in (0, 1)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    wanted = recipe(tmp_path, source=str(tmp_path / "rows.jsonl"), data={"exclude": {"speaker": ["odd"]}})
    _, rows, _ = open_unlabelled(wanted)
    assert len(rows) == 2  # type: ignore[arg-type]


def test_a_split_of_the_same_data(tmp_path: Path) -> None:
    _, rows, _ = open_unlabelled(recipe(tmp_path, train="test"))
    assert len(rows) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes", [{"source": "OUTPUT"}, {"model": "OUTPUT"}, {"model": "OUTPUT/part"}], ids=["source", "model", "inside"]
)
def test_what_is_read_is_not_replaced(changes: dict[str, str], tmp_path: Path) -> None:
    wanted = {k: v.replace("OUTPUT", str(tmp_path / "model")) for k, v in changes.items()}
    with pytest.raises(ValueError, match="would replace"):
        check_recipe(recipe(tmp_path, **wanted))


def test_the_first_model_replaces_nothing_either(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"would replace data\.source"):
        check_recipe(recipe(tmp_path, model=str(tmp_path / "d"), data={"source": str(tmp_path / "d" / "data")}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("rounds", 0, "at least 1, got 0"), ("share", 1.0, "in .0, 1., got 1.0"), ("keep", 0.0, "in .0, 1., got 0.0")],
)
def test_limits(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"pseudo_labels.{field} must be {message}"):
        build(PseudoLabelsRecipe, {"task": TASK, "model": "m", field: value})


def test_the_single_decoder_may_learn_from_its_own_too(tmp_path: Path) -> None:
    plain = plain_recipe(
        tmp_path / "model",
        architecture="single-decoder",
        pseudo_labels={"task": TASK, "model": str(tmp_path / "first"), "keep": 0.5, "limit": 6},
    )
    wanted = build(FuseRecipe, plain)
    check_recipe(wanted)
    fuse(wanted)
    assert (tmp_path / "first" / "run.json").is_file()


def test_one_recipe_from_few_pairs_and_sound_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower learns from sound that has no text, which then gets one: nothing but the three pairs was read aloud."""
    (tmp_path / "sound").mkdir()
    recordings = sorted((workshop() / "data" / "train").glob("*.wav"))
    rows = [json.dumps({"audio": str(shutil.copy(r, tmp_path / "sound"))}) + "\n" for r in recordings[3:]]
    (tmp_path / "sound" / "train.jsonl").write_text("".join(rows))
    (tmp_path / "sound" / "validation.jsonl").write_text("".join(rows[:2]))
    alone = str(tmp_path / "sound")
    pretrain = {
        "data": alone,
        "codec": {"kind": "speech", "options": {"units": 8}},
        "backbone": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "training": {"steps": 2, "batch_size": 2, "evaluate_every": 1},
    }
    speech = {"source": str(tmp_path / "tower"), "train": "full", "pretrain": pretrain}
    wanted = recipe(tmp_path, source=alone)
    wanted = replace(wanted, towers={"text": wanted.towers["text"], "speech": build(TowerRecipe, speech)})
    learned: list[str] = []
    real = towers_module.pretrain

    def noted(recipe: PretrainRecipe, **kwargs: Any) -> dict[str, float]:
        learned.append(recipe.data.source)
        return real(recipe, **kwargs)

    monkeypatch.setattr(towers_module, "pretrain", noted)
    record = fuse(wanted)
    assert learned == [alone]
    assert (record["data"]["rows"]["train"], record["data"]["pseudo_labels"]) == (3, 9)
    with pytest.raises(ValueError, match="unaligned data of tower 'speech'"):
        check_sources(alone, replace(wanted, pseudo_labels=None))
    text = build(TowerRecipe, {"source": str(tmp_path / "text"), "pretrain": pretrain | {"data": None}})
    shutil.rmtree(tmp_path / "tower")
    (tmp_path / "sound" / "validation.jsonl").unlink()
    wrong = replace(wanted, towers={"text": text, "speech": wanted.towers["speech"]}, output=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="no split 'validation'"):
        fuse(wrong)
    assert learned == [alone], "found before the text tower is trained"
    no_split = {"data": {"source": alone, "validation": None}, "training": {"patience": 1}}
    with pytest.raises(ValueError, match=r"training\.patience needs a validation split"):
        replace(wrong, towers={"speech": build(TowerRecipe, {**speech, "pretrain": {**pretrain, **no_split}})})
