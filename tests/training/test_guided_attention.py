"""Guided attention: what it costs to look away from the diagonal, and whom."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import doc, tiny_model
from tiny_recipes import tiny_recipe

from zipper_lm.data.collation import collate
from zipper_lm.data.document import Document
from zipper_lm.data.tasks import parse_task
from zipper_lm.fusion.zips import View
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.checks import check_recipe
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.training.beside import task_pairs
from zipper_lm.training.guided_attention import off_diagonal, query_counts, watched

SPOKEN = doc(("text", [5, 6, 7]), ("speech", [10, 11, 12, 13, 14, 15]))
LONGER = doc(("text", [8, 9, 10, 11, 12, 13]), ("speech", [20, 21, 22]))


def cost(model: ZipperModel, documents: list[Document], weight: float = 1.0) -> list[torch.Tensor]:
    batch, pair = collate(documents, model.specials), ("speech", "text")
    with watched(model, batch, {pair: weight}, query_counts(batch, [pair])) as costs:
        model(batch)
    return costs


def test_the_cost_is_the_papers() -> None:
    """Three tokens that read three: by hand, with g = 0.2."""
    view = View.of(torch.ones(1, 3, 3, dtype=torch.bool))
    half, whole = 1 - math.exp(-(0.5**2) / 0.08), 1 - math.exp(-1 / 0.08)

    def of(attention: torch.Tensor) -> float:
        return float(off_diagonal(attention.expand(1, 2, 3, 3), view, torch.arange(3))) / 3

    assert of(torch.eye(3)) == 0
    assert of(torch.eye(3).flip(0)) == pytest.approx(2 * whole / 3)
    assert of(torch.full((3, 3), 1 / 3)) == pytest.approx((2 * (half + whole) + 2 * half) / 9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    """The hooks are gone when layers are run again in the backward pass."""
    grads = []
    for checkpointing in (False, True):
        model = tiny_model(gate=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.stack(cost(model, [SPOKEN, LONGER])).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any(grad.abs().max() > 0 for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_a_batch_costs_what_its_documents_do() -> None:
    """Neither padding nor rows that read nothing through the pair count; queries count alike."""
    model = tiny_model(gate=0.5)
    heard = doc(("speech", [4, 5, 6]), ("text", [3, 4]))
    alone = [torch.stack(cost(model, [d])) for d in (SPOKEN, LONGER)]
    queries = [8, 5]
    together = torch.stack(cost(model, [SPOKEN, heard, LONGER]))
    assert len(together) == 3
    expected = sum(c * q for c, q in zip(alone, queries)) / sum(queries)
    torch.testing.assert_close(together, expected)
    torch.testing.assert_close(torch.stack(cost(model, [SPOKEN], weight=3.0)), 3 * alone[0])
    assert cost(model, [heard]) == []


def test_segments_that_see_several_are_left_alone() -> None:
    model = tiny_model(gate=0.5)
    turns = Document([*SPOKEN, *LONGER])
    assert cost(model, [turns]) == []
    torch.testing.assert_close(torch.stack(cost(model, [turns, SPOKEN])), torch.stack(cost(model, [SPOKEN])))
    chain = Document([*doc(("speech", [4, 5])), *SPOKEN])  # here the speech that reads has one text to read
    assert cost(model, [chain])


def test_attention_comes_to_the_diagonal() -> None:
    model = tiny_model(gate=0.5)
    zips = [p for p in model.zips["speech"]["text"].parameters() if p.requires_grad]  # type: ignore[index]
    optimizer = torch.optim.Adam(zips, lr=0.02)
    first = float(torch.stack(cost(model, [SPOKEN, LONGER])).sum().detach())
    for _ in range(20):
        optimizer.zero_grad()
        loss = torch.stack(cost(model, [SPOKEN, LONGER])).sum()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * first
    assert not any(module._forward_hooks for module in model.modules()), "nobody watches afterwards"


def test_it_is_part_of_the_loss(tmp_path: Path) -> None:
    training: dict[str, Any] = {"steps": 1, "guided_attention": {"text->speech": 3.0}}
    plain = fuse(tiny_recipe(tmp_path / "plain", training={"steps": 1}))
    guided = fuse(tiny_recipe(tmp_path / "guided", training=training))
    (before, after) = (next(e for e in r["history"] if "loss" in e) for r in (plain, guided))
    assert 0 < after["loss_guided_attention"] < 3
    assert after["loss"] == pytest.approx(before["loss"] + after["loss_guided_attention"], abs=2e-3)


@pytest.mark.parametrize(
    ("weights", "more", "message"),
    [
        ({"speech->image": 1.0}, {}, r"names 'speech->image', but the tasks are \['speech->text'"),
        ({"->speech": 1.0}, {"tasks": {"->speech": 1}}, "'->speech' does not go from one modality to one other"),
        ({"text->speech": 1.0}, {"architecture": "single-decoder"}, "is for zips; architecture 'single-decoder'"),
    ],
)
def test_refused(weights: dict[str, float], more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.guided_attention.*" + message):
        check_recipe(tiny_recipe(tmp_path / "m", training={"guided_attention": weights}, **more))


def test_weights_are_not_negative(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.guided_attention\.text->speech must be at least 0, got -1"):
        tiny_recipe(tmp_path / "m", training={"guided_attention": {"text->speech": -1.0}})


def test_the_reader_is_what_is_written() -> None:
    tasks = {t: parse_task(t) for t in ("speech->text", "text->speech")}
    assert task_pairs("guided_attention", {"text->speech": 2.0}, tasks) == {("speech", "text"): 2.0}


def test_a_device_is_not_asked_which_queries_count() -> None:
    """A tensor on meta could not say."""
    model = tiny_model(gate=0.5).train()
    batch, pair = collate([SPOKEN, LONGER, doc(("text", [3, 4]))], model.specials).to("meta"), ("speech", "text")
    counts = query_counts(batch, [pair])
    assert counts == {pair: 13}
    with watched(model.to("meta"), batch, {pair: 1.0}, counts) as costs:
        model(batch)
    torch.stack(costs).sum().backward()
    assert len(costs) == 3
