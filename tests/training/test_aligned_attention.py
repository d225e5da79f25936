"""Aligned attention: where joint CTC hears what is written next, and what it costs to look elsewhere."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_recipes import tiny_recipe
from tiny_steps import DOCUMENTS, check_same, lettered, one_step, spoken

from zipper_lm import Document, ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.checks import check_recipe
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.training.aligned_attention import LEAST, WIDTH, AlignedAttention, best_alignments, places_sought
from zipper_lm.training.ctc import Ctc

PAIR = ("text", "speech")
HEARD = spoken([4, 9, 9], [5, 6, 7, 8, 9], reads=True)
LONGER = spoken([12, 4, 7, 11], [9, 6, 7, 5, 4, 8, 10, 11], reads=True)


def made(**more: Any) -> ZipperModel:
    return lettered(tiny_model(gate=0.5, kinds={"speech": "qwen3"}, **more))


def loss_of(model: ZipperModel, weight: float = 1.0) -> AlignedAttention:
    torch.manual_seed(3)
    return AlignedAttention({PAIR: weight}, Ctc(model, {PAIR: 1.0}))


def costs(model: ZipperModel, loss: AlignedAttention, documents: list[Document], **how: Any) -> torch.Tensor:
    batch = collate(documents, model.specials, **how)
    with loss.watch(model, batch, loss.counts(batch)) as found:
        model(batch)
    return torch.stack(found)


def by_hand(said: torch.Tensor, text: list[int]) -> list[float]:
    """The likeliest of all paths that spell a text, and where its letters stand."""
    paths = itertools.product(range(said.shape[1]), repeat=said.shape[0])
    spelled = [p for p in paths if [i for i, _ in itertools.groupby(p) if i] == text]
    best = max(spelled, key=lambda path: sum(said[time, symbol].item() for time, symbol in enumerate(path)))
    runs = [list(run) for _, run in itertools.groupby(enumerate(best), lambda pair: pair[1])]
    return [sum(time for time, _ in run) / len(run) for run in runs if run[0][1]]


@pytest.mark.parametrize("seed", range(5))
def test_the_alignment_is_the_likeliest_of_all(seed: int) -> None:
    """Of texts of several lengths beside each other, with the same letter twice, and with no place to spare."""
    torch.manual_seed(seed)
    texts, times = [[1, 2], [2], [1, 1], [3, 1, 2], [2, 2, 3]], [5, 4, 5, 3, 4]
    said = (2 * torch.randn(5, 5, 4)).log_softmax(-1)
    found = best_alignments(said, torch.tensor(times), texts)
    for row, text, time, places in zip(said, texts, times, found):
        assert places.tolist() == pytest.approx(by_hand(row[:time], text))


def test_a_query_looks_for_the_letters_of_its_next_token() -> None:
    """In their middle; where there are none, at the letter before; at last at the end."""
    letters = torch.tensor([1.0, 3.0, 5.0, 9.0])
    assert places_sought(letters, torch.tensor([2, 2, 4]), 11).tolist() == [2.0, 3.0, 7.0, 11.0]
    assert places_sought(letters, torch.tensor([0, 4]), 11).tolist() == [1.0, 4.5, 11.0]
    assert places_sought(letters, torch.tensor([1, 2, 3, 4]), 9).tolist() == [1.0, 3.0, 5.0, 9.0, 9.0]


def test_a_token_may_be_a_part_of_a_letter() -> None:
    """What a token brings is then known from the text up to it: alone it is no letter, but the sign for none."""
    euro = {4: b"\xe2", 5: b"\x82", 6: b"\xac", 7: b"ab"}
    model = lettered(
        tiny_model(gate=0.5), lambda rows: [b"".join(euro[i] for i in r).decode(errors="replace") for r in rows]
    )
    loss = loss_of(model)
    documents = [
        spoken([7, 4, 5, 6, 7], [5, 6, 7, 8, 9, 4, 5, 6], reads=True),
        spoken([7, 7], [5, 6, 7, 8], reads=True),
    ]
    found = loss.written(collate(documents, model.specials), PAIR)
    assert [len(each.spelled.letters) for each in found] == [7, 4]
    assert [each.ends.tolist() for each in found] == [[2, 5, 5, 5, 7], [2, 4]]


def test_the_cost_by_hand() -> None:
    """Of one zip layer: what its heads, averaged, look at near the places that its own spelling gives."""
    model = made(zips=ZipSpec(layers=1, gate_start=0.5))
    loss, batch, seen = loss_of(model, 2.0), collate([HEARD], model.specials), []
    layer = model.zip_layer(*PAIR, 0)
    memories: list[torch.Tensor] = []
    hooks = [
        layer.memory_projection.register_forward_hook(lambda _m, _a, memory: memories.append(memory)),
        layer.register_forward_hook(lambda m, args, _: seen.append(m.attention_map(*args)) if len(args) == 4 else None),
    ]
    with loss.watch(model, batch, loss.counts(batch)) as found, torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    said = loss.spelling.heads_of(PAIR)[0](memories[0][0]).log_softmax(-1)[:, [0, *(1 + ord(x) for x in "ej")]]
    places = [*by_hand(said.detach(), [1, 2, 2]), 6.0]
    near = [[math.exp(-((time - place) ** 2) / (2 * WIDTH**2)) for time in range(7)] for place in places]
    looked = seen[0][0].mean(0)[:4]
    expected = -sum(math.log(float((row * torch.tensor(by)).sum()) + LEAST) for row, by in zip(looked, near)) / 4
    assert torch.stack(found).item() == pytest.approx(2.0 * expected, rel=1e-4)


def test_a_batch_costs_what_its_documents_do() -> None:
    """Padding, documents that share a row, and rows that are not read make no difference: queries count alike."""
    model = made()
    loss = loss_of(model)
    batches = [collate([document], model.specials) for document in (HEARD, LONGER)]
    assert [int(loss.counts(batch)[PAIR]) for batch in batches] == [4, 5]
    alone = [costs(model, loss, [document]) for document in (HEARD, LONGER)]
    expected = (4 * alone[0] + 5 * alone[1]) / 9
    said, empty = spoken([4, 9], [5, 6, 7], reads=False), spoken([], [5, 6, 7], reads=True)
    short = spoken([4, 4, 4, 4], [5, 6, 7], reads=True)  # joint CTC does not count it either
    torch.testing.assert_close(costs(model, loss, [HEARD, said, LONGER, empty, short]), expected)
    torch.testing.assert_close(costs(model, loss, [LONGER, HEARD], side="left"), expected)
    torch.testing.assert_close(costs(model, loss, [said, LONGER, HEARD], packing=True), expected)
    assert len(expected) == 3
    assert loss.counts(collate([said, empty], model.specials)) == {PAIR: 0}


def test_attention_finds_the_places() -> None:
    """And the alignment is left alone: what spells, and what is remembered, is not moved to make looking easy."""
    model = made()
    loss, documents = loss_of(model), [HEARD, LONGER]
    zips = [p for n, p in model.zips["text"]["speech"].named_parameters() if "q_proj" in n or n.endswith("norm.weight")]  # type: ignore[index, union-attr]
    optimizer, first = torch.optim.Adam(zips, lr=0.05), costs(model, loss, documents).sum().item()
    for _ in range(40):
        optimizer.zero_grad()
        cost = costs(model, loss, documents).sum()
        cost.backward()
        optimizer.step()
    assert cost.item() < 0.75 * first
    assert not any(p.grad is not None for p in loss.spelling.parameters())
    assert not any(module._forward_hooks for module in model.modules()), "nobody watches afterwards"


@pytest.mark.parametrize(("batch", "accumulated", "packing"), [(2, 2, False), (1, 4, False), (4, 1, True)])
def test_however_a_step_is_cut_it_is_the_same(batch: int, accumulated: int, packing: bool) -> None:
    def step(*cut: int, packing: bool = False) -> Any:
        model = made(train={"text": "full", "speech": "full"})
        torch.manual_seed(4)
        return one_step(*cut, model, DOCUMENTS, packing=packing, beside={"ctc": {PAIR: 0.5}, "aligned": {PAIR: 2.0}})

    whole = step(4, 1)
    assert whole[1]["loss_aligned_attention"] > 0.5
    check_same(step(batch, accumulated, packing=packing), whole)


def test_a_recipe_asks_for_it(tmp_path: Path) -> None:
    """It is a part of the loss, and fades out with joint CTC."""
    weights = {"ctc": {"speech->text": 1.0}, "aligned_attention": {"speech->text": 1.0}}
    still = {"steps": 4, "learning_rate": 0.0, "tower_learning_rate": 0.0, **weights}
    runs = [fuse(tiny_recipe(tmp_path / n, training=still | more)) for n, more in (("a", {}), ("b", {"fade_out": 0.5}))]
    stays, fades = ([e["loss_aligned_attention"] for e in r["history"] if "loss_aligned_attention" in e] for r in runs)
    assert fades == pytest.approx([stays[0], stays[1] / 2, 0, 0], abs=1e-4)
    assert min(stays) > 0.1


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"aligned_attention": {"speech->text": 1.0}},
            r"aligned_attention names \['speech->text'\], but training\.ctc",
        ),
        ({"aligned_attention": {"speech->text": -1}, "ctc": {"speech->text": 1}}, "must be at least 0, got -1"),
    ],
)
def test_refused(training: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\..*" + message):
        check_recipe(tiny_recipe(tmp_path / "m", training=training))
    with pytest.raises(ValueError, match=r"names \['speech->text'\], but training\.ctc"):
        AlignedAttention({PAIR: 1.0}, None)
