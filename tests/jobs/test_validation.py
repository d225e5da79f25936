"""What is scored in training, by what, and what stands in where nothing can be."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tiny_recipes import tiny_recipe, workshop

from zipper_lm.data.encoding import encode_rows
from zipper_lm.evaluation.judges import load_judge
from zipper_lm.generation.writer import Writer
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.prepare import prepare
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.jobs.rows import DataSource
from zipper_lm.jobs.towers import build_model
from zipper_lm.jobs.validation import Scorer, judge_of


def scorer(recipe: FuseRecipe, modalities: tuple[str, ...] = ("speech", "text")) -> tuple[Scorer, Writer, list[Any]]:
    model = build_model(recipe)
    assert model.processor is not None
    rows = encode_rows(model.processor, DataSource(recipe.data).validation_rows(), modalities)
    trained = [task for task, weight in recipe.tasks.items() if weight > 0]
    size, settings = recipe.training.batch_size, recipe.generation
    return Scorer(model, rows, trained, recipe.scored, settings=settings, batch_size=size), model, list(rows)


def test_every_task_that_writes_after_something_and_the_mean_of_them(tmp_path: Path) -> None:
    tasks = {"speech->text": 1.0, "text->speech": 1.0, "->speech": 1.0, "speech->text->speech": 0.0}
    recipe = tiny_recipe(tmp_path / "m", tasks=tasks)
    score, model, _ = scorer(recipe)
    assert (score.tasks, score.judged) == (["speech->text", "text->speech"], ["speech"])
    assert recipe.judge is not None
    judge = load_judge(recipe.judge)
    nobody = partial(judge_of, DataSource(recipe.data).originals)  # the given one suits
    score.find_judges(model, judge, nobody, Console(quiet=True))
    assert score.judges == {"speech": judge}
    metrics = score(model)
    assert set(metrics) == {"wer", *(f"{kind}/{task}" for kind in ("wer", "cer") for task in score.tasks)}
    assert metrics["wer"] == pytest.approx(np.mean([metrics[f"wer/{task}"] for task in score.tasks]))


def test_only_what_the_recipe_names(tmp_path: Path) -> None:
    """The model that writes down sound for others was once chosen by the mean over reading and speaking: of 30 pairs,
    one that read 87 % wrong and spoke least badly, in place of a later one that read 63 % wrong."""
    score, model, _ = scorer(tiny_recipe(tmp_path / "m", scored=["speech->text"]))
    assert (score.tasks, score.judged) == (["speech->text"], [])
    metrics = score(model)
    assert metrics["wer"] == metrics["wer/speech->text"]


def test_sound_without_its_text_is_scored_by_the_loss(tmp_path: Path) -> None:
    """Nobody says what should have been heard."""
    score, model, rows = scorer(tiny_recipe(tmp_path / "m", tasks={"->speech": 1.0}), ("speech",))
    assert score.tasks == []
    assert "text" not in rows[0]
    metrics = score(model)
    assert set(metrics) == {"loss", "loss/speech"}
    assert metrics["loss"] == metrics["loss/speech"] > 0


def test_whole_documents_are_scored_by_their_loss(tmp_path: Path) -> None:
    speech, text = {"modality": "speech", "value": "0.wav"}, {"modality": "text", "value": "one two", "target": True}
    line = json.dumps({"segments": [speech, text]})
    (tmp_path / "data").mkdir()
    shutil.copy(workshop() / "data" / "train" / "0.wav", tmp_path / "data")
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(f"{line}\n" * 4)
    record = fuse(tiny_recipe(tmp_path / "m", data=str(tmp_path / "data"), tasks={}, judge=None))
    assert [e["eval_loss"] > 0 for e in record["history"] if "eval_loss" in e] == [True]


def test_without_the_originals_there_is_no_judge_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZIPPER_CACHE", str(tmp_path / "cache"))
    shutil.copytree(workshop() / "data", tmp_path / "raw")
    prepare(tiny_recipe(tmp_path / "m", data=str(tmp_path / "raw")), tmp_path / "ids")
    shutil.rmtree(tmp_path / "raw")
    record = fuse(tiny_recipe(tmp_path / "m", data=str(tmp_path / "ids"), judge=None))
    assert "no judge of speech, so it is not scored" in " ".join(capsys.readouterr().err.split())
    (scores,) = [e for e in record["history"] if "eval_wer" in e]
    assert [k for k in scores if k.startswith("eval_wer/")] == ["eval_wer/speech->text"]


def test_no_judge_is_fitted_on_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be fetched as a whole for that."""
    data = {"source": str(workshop() / "data"), "streaming": True}
    record = fuse(tiny_recipe(tmp_path / "m", data=data, judge=None))
    assert "a stream is not fetched as a whole to fit one on" in " ".join(capsys.readouterr().err.split())
    assert any("eval_wer/speech->text" in entry for entry in record["history"])
