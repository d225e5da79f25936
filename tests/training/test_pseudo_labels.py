"""Pseudo-labels: what a first model writes beside what is known, and what the next one learns from."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from tiny_recipes import plain_recipe, say, tiny_recipe, workshop

from zipper_lm import ZipperModel
from zipper_lm.data.broken import Broken
from zipper_lm.data.tasks import parse_task
from zipper_lm.document import Segment
from zipper_lm.modality.codec import load_codec
from zipper_lm.recipe import build
from zipper_lm.training import pseudo_labels as module
from zipper_lm.training.callbacks import Interrupted
from zipper_lm.training.data import Joined
from zipper_lm.training.fuse import check_recipe, fuse
from zipper_lm.training.pseudo_labels import label, labeller_recipe, mixed, open_unlabelled
from zipper_lm.training.recipes import FuseRecipe, PseudoLabelsRecipe
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
    assert (third.pseudo_labels.rounds, second.output) == (2, str(tmp_path / "first-before"))
    assert (first.pseudo_labels, first.output) == (None, str(tmp_path / "first-before-before"))
    assert first.data == wanted.data
    with pytest.raises(ValueError, match="has none"):
        labeller_recipe(first)


def test_from_pairs_to_a_model_that_learned_from_all_the_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pairs; the other nine recordings have no text here that anybody reads."""
    seen: list[tuple[int, int]] = []
    real = module.mixed

    def noted(aligned: Any, labelled: Any, share: Any) -> Any:
        seen.append((len(aligned), len(labelled)))
        return real(aligned, labelled, share)

    monkeypatch.setattr("zipper_lm.training.fuse.mixed", noted)
    record = fuse(recipe(tmp_path))
    assert record["frozen_unchanged"] == {"text": True}
    first = json.loads((tmp_path / "first" / "run.json").read_text())
    assert first["recipe"]["pseudo_labels"] is None
    ((pairs, labelled),) = seen
    assert pairs == first["data"]["rows"]["train"] == 3
    assert 1 <= labelled <= 12
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
    task, rows = open_unlabelled(wanted)
    assert wanted.pseudo_labels is not None
    made = label(Labeller(model, ["six", "two"]), model, task, rows, wanted.pseudo_labels, {}, Broken())  # type: ignore[arg-type]
    assert [row["text"].value for row in made] == ["six", "two"]
    assert made[0]["speech"].ids == model.processor.codecs["speech"].encode([say("one two")])[0]  # type: ignore[union-attr]


def test_rows_for_which_nothing_was_written_are_left_out(tmp_path: Path, model: ZipperModel) -> None:
    wanted = recipe(tmp_path, limit=3)
    task, rows = open_unlabelled(wanted)
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
    task, rows = open_unlabelled(wanted)
    assert wanted.pseudo_labels is not None
    losses = {"one": 3.0, "two": 0.5, "six": 9.0, "six six": 0.1}
    monkeypatch.setattr(module, "_loss", lambda _, document: losses[document[-1].value])
    texts = ["one", "two", "six", "six six"]
    made = label(Labeller(model, texts), model, task, rows, wanted.pseudo_labels, {}, Broken())  # type: ignore[arg-type]
    assert [row["text"].value for row in made] == ["two", "six six"]


def test_the_loss_is_that_of_what_was_written(model: ZipperModel) -> None:
    row = {"speech": Segment("speech", ids=[5, 6]), "text": Segment("text", ids=[6, 7, 8])}
    document = module.build_document(parse_task(TASK), row)
    with torch.no_grad():
        ends = float(model(module.collate([document], model.specials)).losses["text"])
    assert module._loss(model, document) == pytest.approx(ends)


@pytest.mark.parametrize(("share", "times"), [(None, 1), (0.5, 5), (0.8, 1), (0.05, 95)])
def test_pairs_are_repeated_to_their_share(share: float | None, times: int) -> None:
    rows = mixed(["a", "b"], list(range(10)), share)
    assert isinstance(rows, Joined)
    assert [r for r in rows if isinstance(r, str)] == ["a", "b"] * times
    assert [r for r in rows if isinstance(r, int)] == list(range(10))


def test_another_codec_is_refused(tmp_path: Path, model: ZipperModel) -> None:
    wanted = recipe(tmp_path)
    task, rows = open_unlabelled(wanted)
    other = type(model.processor.codecs["speech"]).fit([say("one")], units=4)  # type: ignore[union-attr]
    stranger = ZipperModel.fuse({name: str(workshop() / name) for name in ("text", "speech")}, codecs={"speech": other})
    with pytest.raises(ValueError, match="another codec of 'speech'"):
        label(stranger, model, task, rows, wanted.pseudo_labels, {}, Broken())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"task": "speech"}, "has no arrow"),
        ({"task": "->text"}, "gives nothing"),
        ({"task": "speech->video"}, "unknown modality 'video'"),
        ({"model": ""}, "pseudo_labels.model: name the folder"),
        ({"source": "/nowhere"}, "/nowhere"),
    ],
)
def test_found_before_any_work(wanted: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fuse(recipe(tmp_path, **wanted))
    assert not any(tmp_path.iterdir())


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
