"""Forward-sum: what attention costs that is not monotonic, in reading and in speaking."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_recipes import tiny_recipe
from tiny_steps import DOCUMENTS, check_same, one_step, spoken
from torch import Tensor

from zipper_lm import Document
from zipper_lm.data.collation import collate
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.checks import check_recipe
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.training.beside import SegmentPair
from zipper_lm.training.forward_sum import ForwardSum, forward_sum
from zipper_lm.training.recipe import BESIDE

READS, SPEAKS = ("text", "speech"), ("speech", "text")
HEARD = spoken([4, 9, 9], [5, 6, 7, 8, 9], reads=True)
LONGER = spoken([12, 4, 7, 11], [9, 6, 7, 5, 4, 8, 10, 11], reads=True)
SAID = spoken([4, 9, 9], [5, 6, 7, 8, 9], reads=False)
SHORT = spoken([12, 4, 7, 11], [9, 6], reads=False)


def model_of(**more: Any) -> ZipperModel:
    return tiny_model(gate=0.5, kinds={"speech": "qwen3"}, **more)


def costs(model: ZipperModel, documents: list[Document], pair: tuple[str, str], **how: Any) -> Tensor:
    batch, loss = collate(documents, model.specials, **how), ForwardSum({pair: 1.0})
    with loss.watch(model, batch, loss.counts(batch)) as found:
        model(batch)
    return torch.stack(found)


def segments(row: int, writes: list[int], read: list[int]) -> SegmentPair:
    return SegmentPair(row, torch.tensor(writes), torch.tensor(read), torch.tensor([]))


def by_hand(scores: Tensor) -> float:
    """Of the longer segment in rows: a blank, or a token of the shorter one, such that all come in their order."""
    spread = scores.softmax(-1).mean(0)
    blank = math.exp(-1)
    said = [[blank / (1 + blank), *(p / (1 + blank) for p in row)] for row in spread.tolist()]
    total = 0.0
    for path in itertools.product(range(scores.shape[2] + 1), repeat=scores.shape[1]):
        if [token for token, _ in itertools.groupby(path) if token] == list(range(1, scores.shape[2] + 1)):
            total += math.prod(said[time][token] for time, token in enumerate(path))
    return -math.log(total)


def test_the_cost_is_the_sum_over_all_monotonic_alignments() -> None:
    """Whichever segment is the longer one: along it they run. Padding and other rows are left alone."""
    torch.manual_seed(0)
    scores = 2 * torch.randn(3, 2, 6, 6)
    speaks, reads = segments(1, [0, 1, 2, 4], [1, 3]), segments(2, [3, 4], [0, 1, 2, 5])
    short = segments(0, [2], [3, 4, 5])
    expected = [
        by_hand(scores[1][:, [0, 1, 2, 4]][:, :, [1, 3]]),
        by_hand(scores[2][:, [3, 4]][:, :, [0, 1, 2, 5]].transpose(1, 2)),
        by_hand(scores[0][:, [2]][:, :, [3, 4, 5]].transpose(1, 2)),
    ]
    assert [forward_sum(scores, [pair]).item() for pair in (speaks, reads, short)] == pytest.approx(expected, rel=1e-5)
    assert forward_sum(scores, [speaks, reads, short]).item() == pytest.approx(sum(expected), rel=1e-5)


def test_in_order_is_cheap_off_the_diagonal_too() -> None:
    """That which guided attention would not know: a sound that begins with a long silence."""
    late = torch.full((1, 1, 8, 3), -20.0)
    for time, token in enumerate([0, 0, 0, 0, 0, 1, 2, 2]):
        late[0, 0, time, token] = 20.0
    pair = [segments(0, list(range(8)), [0, 1, 2])]
    assert forward_sum(late, pair) < 8 * 0.32  # no more than what blanks take from every token
    assert forward_sum(late.flip(2), pair) > 20


@pytest.mark.parametrize(("pair", "two"), [(READS, [HEARD, LONGER]), (SPEAKS, [SAID, SHORT])], ids=["read", "speak"])
def test_a_batch_costs_what_its_documents_do(pair: tuple[str, str], two: list[Document]) -> None:
    """By the tokens of the longer segments; neither padding nor rows that read nothing through the pair count."""
    model = model_of()
    batches = [collate([document], model.specials) for document in two]
    tokens = [int(ForwardSum({pair: 1.0}).counts(batch)[pair]) for batch in batches]
    assert tokens == ([7, 10] if pair == READS else [6, 6])
    alone = [costs(model, [document], pair) for document in two]
    expected = sum(cost * n for cost, n in zip(alone, tokens)) / sum(tokens)
    other = SAID if pair == READS else HEARD
    torch.testing.assert_close(costs(model, [two[0], other, two[1]], pair), expected)
    torch.testing.assert_close(costs(model, two, pair, side="left"), expected)
    torch.testing.assert_close(costs(model, two, pair, packing=True), expected)
    assert len(expected) == 3


def test_turns_are_each_aligned_with_the_one_before() -> None:
    model = model_of()
    turns = Document([*HEARD, *LONGER])
    batch = collate([turns], model.specials)
    assert ForwardSum({READS: 1.0}).counts(batch) == {READS: 17}
    assert costs(model, [turns], READS).isfinite().all()


@pytest.mark.parametrize("pair", [READS, SPEAKS], ids=["read", "speak"])
def test_attention_becomes_monotonic(pair: tuple[str, str]) -> None:
    model, documents = model_of(), [HEARD, LONGER, SAID]
    zips = [p for p in model.zips[pair[0]][pair[1]].parameters() if p.requires_grad]  # type: ignore[index]
    optimizer = torch.optim.Adam(zips, lr=0.02)
    first = costs(model, documents, pair).sum().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss = costs(model, documents, pair).sum()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * first
    assert not any(module._forward_hooks for module in model.modules()), "nobody watches afterwards"


@pytest.mark.parametrize(("batch", "accumulated", "packing"), [(2, 2, False), (1, 4, False), (4, 1, True)])
def test_however_a_step_is_cut_it_is_the_same(batch: int, accumulated: int, packing: bool) -> None:
    def step(*cut: int, packing: bool = False) -> Any:
        model = model_of(train={"text": "full", "speech": "full"})
        return one_step(*cut, model, DOCUMENTS, packing=packing, beside={"forward_sum": {READS: 1.0, SPEAKS: 0.5}})

    whole = step(4, 1)
    assert whole[1]["loss_forward_sum"] > 0.5
    check_same(step(batch, accumulated, packing=packing), whole)


def test_it_fades_out(tmp_path: Path) -> None:
    """Half of it after half of the share, nothing from its end on."""
    weight = {"forward_sum": {"speech->text": 1.0, "text->speech": 1.0}}
    runs = [
        fuse(
            tiny_recipe(
                tmp_path / name, training={"steps": 4, "learning_rate": 0.0, "tower_learning_rate": 0.0, **more}
            )
        )
        for name, more in (("stays", weight), ("fades", {**weight, "fade_out": 0.5}))
    ]
    stays, fades = ([e["loss_forward_sum"] for e in run["history"] if "loss_forward_sum" in e] for run in runs)
    assert fades == pytest.approx([stays[0], stays[1] / 2, 0, 0], abs=1e-4)
    assert min(stays) > 0.1


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"forward_sum": {"speech->image": 1.0}}, r"forward_sum names 'speech->image', but the tasks are"),
        ({"forward_sum": {"speech->text": -1}}, r"forward_sum\.speech->text must be at least 0, got -1"),
        ({"fade_out": 0.5}, rf"fade_out=0\.5 has no effect without one of {re.escape(str(list(BESIDE)))}$"),
        ({"forward_sum": {"speech->text": 1.0}, "fade_out": 1.5}, r"fade_out must be in \(0, 1\], got 1\.5"),
    ],
)
def test_refused(training: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\." + message):
        check_recipe(tiny_recipe(tmp_path / "m", training=training))


def test_a_device_is_not_asked() -> None:
    """A tensor on meta could not say."""
    model = model_of().train()
    batch, loss = collate([SAID, HEARD], model.specials).to("meta"), ForwardSum({SPEAKS: 1.0})
    counts = loss.counts(batch)
    assert counts == {SPEAKS: 6}
