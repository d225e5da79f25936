"""What is looked at before and after training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_recipes import tiny_recipe

from zipper_lm import Document, Segment, ZipperModel
from zipper_lm.data.encoding import encode_rows
from zipper_lm.jobs import failures
from zipper_lm.jobs.failures import BATCHES, diagnose, rare_tokens, some_batches, unimodal_perplexity
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.jobs.rows import DataSource
from zipper_lm.jobs.towers import build_model


def fresh(folder: Path) -> tuple[FuseRecipe, ZipperModel, Sequence[Any]]:
    """A recipe, its model before training, and encoded validation rows."""
    recipe = tiny_recipe(folder / "m")
    model = build_model(recipe)
    assert isinstance(model, ZipperModel)
    assert model.processor is not None
    return recipe, model, encode_rows(model.processor, DataSource(recipe.data).validation_rows(), ["speech", "text"])


def tasks_of(recipe: FuseRecipe) -> list[str]:
    return [task for task, weight in recipe.tasks.items() if weight > 0]


def test_perplexity_of_what_is_trained_alone(tmp_path: Path) -> None:
    _, model, rows = fresh(tmp_path)
    found = unimodal_perplexity(model, rows)
    with torch.no_grad():
        losses = [model.unimodal_loss("speech", [row["speech"].ids or []]) for row in rows]
    expected = math.exp(sum(loss for loss, _ in losses) / sum(count for _, count in losses))
    assert found == {"speech": pytest.approx(expected, rel=1e-4)}, "the text tower is frozen"
    assert unimodal_perplexity(model, [Document([Segment("speech", ids=[3, 4], target=True)])]) == {}


def test_batches_hold_every_task_and_whole_documents(tmp_path: Path) -> None:
    recipe, model, rows = fresh(tmp_path)
    whole = Document([Segment("text", ids=[3, 4]), Segment("speech", ids=[3, 4], target=True)])
    batches = some_batches(model, tasks_of(recipe), recipe.training.batch_size, [*rows, whole])
    targets = {
        name: sum(int((batch[name]["labels"] >= 0).any(1).sum()) for batch in batches if name in batch)
        for name in ("text", "speech")
    }
    assert targets == {"text": 2, "speech": 3}, "half of the four rows for each task, and the document"
    many = some_batches(model, tasks_of(recipe), recipe.training.batch_size, [whole] * 1000)
    assert sum(len(batch["text"]["segments"]) for batch in many) == BATCHES * recipe.training.batch_size


def test_tasks_without_weight_need_no_rows(tmp_path: Path) -> None:
    """A task that was switched off by a weight of 0 ended a run after its training, before its model was saved."""
    recipe, model, rows = fresh(tmp_path)
    recipe.tasks = {"speech->text": 1.0, "image->text": 0.0}
    (batch,) = some_batches(model, tasks_of(recipe), recipe.training.batch_size, rows)
    assert int((batch["text"]["labels"] >= 0).any(1).sum()) == len(rows) == 4


def test_a_zip_that_no_task_trains_is_no_failure(tmp_path: Path) -> None:
    """With speech->text alone it was said that speech<-text does little, and advised to train for longer."""
    recipe, model, rows = fresh(tmp_path)
    before = unimodal_perplexity(model, rows)
    found = diagnose(model, ["speech->text"], recipe.training.batch_size, rows, rows, before)
    assert ["text<-speech" in failure.message for failure in found] == [True]


def test_a_fresh_model_is_told_from_one_that_drifted(tmp_path: Path) -> None:
    recipe, model, rows = fresh(tmp_path)
    before = unimodal_perplexity(model, rows)
    assert {s.name for s in diagnose(model, tasks_of(recipe), recipe.training.batch_size, rows, rows, before)} == {
        "fusion not started"
    }
    with torch.no_grad():
        for name, parameter in model.zips.named_parameters():
            if name.endswith("o_proj.weight"):
                torch.nn.init.normal_(parameter, std=1.0)
        head = model.tower("speech").backbone.get_output_embeddings().weight
        head.mul_(-20)
    assert {s.name for s in diagnose(model, tasks_of(recipe), recipe.training.batch_size, rows, rows, before)} == {
        "unimodal drift"
    }


def test_tokens_that_are_hardly_seen_are_told_before_training() -> None:
    """A frozen LLM was fused for hours with 10 000 sentences, of whose tokens a quarter had been seen fewer than ten
    times: it heard how phrases begin, and went on in words of its own."""
    large = SimpleNamespace(vocab_size=49152)
    common, rare = [[5, 6, 7]] * 10, [[40000, 5, 41000]]
    assert rare_tokens("text", large, common, common) == []  # type: ignore[arg-type]
    (found,) = rare_tokens("text", large, [*common, [41000]], [*rare, *rare])  # type: ignore[arg-type]
    assert found.name == "rare tokens"
    assert (
        "text: 67 % of the tokens of held-out rows stand fewer than 10 times in the training rows, 33 % never"
        in found.message
    )
    assert "towers.text.codec.options.merges" in found.message
    assert rare_tokens("text", SimpleNamespace(vocab_size=512), common, rare) == []  # type: ignore[arg-type]
    assert rare_tokens("text", large, common, []) == []  # type: ignore[arg-type]


def test_only_what_is_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that are read alone need not be learned; a fusion says so before its first step, and in its record."""
    monkeypatch.setattr(failures, "LARGE", 0)
    monkeypatch.setattr(failures, "SELDOM", 10**6)
    reads, writes = (
        fuse(tiny_recipe(tmp_path / name, training={"steps": 1}, tasks={task: 1}))["signatures"]
        for name, task in (("reads", "text->speech"), ("writes", "speech->text"))
    )
    assert not any("stand fewer than" in message for message in reads)
    assert any("text: 100 % of the tokens of held-out rows stand fewer than" in message for message in writes)
