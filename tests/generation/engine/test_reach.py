"""What a step reads of its buffers is all that its rows need, and no more."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import doc, ids_of, often_ending, tiny_model

from zipper_lm import Engine
from zipper_lm.generation.engine import reach as reach_module
from zipper_lm.generation.engine.reach import Reach
from zipper_lm.generation.engine.rows import Rows
from zipper_lm.generation.engine.step import Step, copy_of, like_cache
from zipper_lm.generation.engine.weights import weights_as

CPU = torch.device("cpu")


def test_a_part_is_read_in_grains() -> None:
    reach = Reach(4, 64, {"speech": 128}, CPU)
    reach.set([], 1, {})
    assert (len(reach.columns), len(reach.memory["speech"])) == (32, 32)
    reach.set([], 33, {"speech": 70})
    assert (len(reach.columns), len(reach.memory["speech"])) == (64, 96)
    assert reach.columns.tolist() == list(range(64))


def test_a_gpu_reads_everything() -> None:
    """Its graphs have fixed sizes."""
    reach = Reach(40, 64, {"speech": 128}, torch.device("meta"))
    reach.choose_rows()
    reach.set([3], 1, {"speech": 1})
    assert (len(reach.columns), len(reach.memory["speech"]), reach.rows) == (64, 128, None)


@pytest.mark.parametrize(
    ("writing", "rows"),
    [
        ([39, 2], [*range(15), 39]),
        (range(20, 37), [*range(7), *range(20, 37)]),
        (range(40), list(range(40))),
    ],
)
def test_rows_are_those_that_write_filled_up(writing: Any, rows: list[int]) -> None:
    reach = Reach(40, 64, {}, CPU)
    reach.choose_rows()
    reach.set(writing, 1, {})
    assert reach.rows is not None
    assert reach.rows.tolist() == rows
    assert reach.here(torch.arange(40) * 2).tolist() == [2 * row for row in rows]


@pytest.mark.parametrize(
    "more",
    [{}, {"guidance_scale": 1.7}, {"repetition_penalty": 1.5, "do_sample": True, "seed": 3}, {"output_scores": True}],
    ids=lambda more: ",".join(more) or "greedy",
)
def test_rows_that_rest_are_left_out(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    """Only a compiled step leaves them out, which no fast test has; here one that is not compiled does, four rows of
    ten at a time or more. Each has a length of its own, and what it wrote is read by the next segment."""
    monkeypatch.setattr(reach_module, "LEAST_ROWS", 4)
    monkeypatch.setattr(reach_module, "GRAIN_OF_ROWS", 1)
    sizes: set[int] = set()
    plain: Callable[..., None] = Rows.reach_out

    def fewer(rows: Rows) -> None:
        if not rows.reach.chooses:
            rows.reach.choose_rows()
        plain(rows)
        assert rows.reach.rows is not None
        sizes.add(len(rows.reach.rows))

    monkeypatch.setattr(Rows, "reach_out", fewer)
    model = often_ending(tiny_model(2, gate=1.0)).eval()
    documents = [doc(("speech", [5 + i] * (2 + 9 * (i % 5)))) for i in range(9)]
    settings = {name: {"max_new_tokens": 12, **more} for name in model.names}
    want = model.generate(documents, ["text", "speech"], settings=settings)
    with Engine(model, slots=10, compile=False) as engine:
        found = model.generate(documents, ["text", "speech"], settings=settings, engine=engine)
    assert ids_of(found) == ids_of(want)
    for one, other in zip(found, want):
        for mine, plainly in zip(one, other):
            if plainly.logprobs is not None:
                torch.testing.assert_close(mine.logprobs, plainly.logprobs, atol=1e-4, rtol=1e-4)
    assert min(sizes) == 4
    assert max(sizes) > 4


@pytest.mark.parametrize(
    ("narrow", "weights", "kind", "chooses"),
    [
        (None, None, "llama", True),
        ("zips", None, "llama", False),
        ("input_projections", None, "llama", False),
        (None, "int8", "llama", False),
        (None, None, "lfm2", False),
    ],
)
def test_rows_are_left_out_where_that_changes_nothing(narrow: Any, weights: Any, kind: str, chooses: bool) -> None:
    """In fewer bits a row would depend on how many are computed beside it; a recurrent state has no rows to choose."""
    model = tiny_model(2, kinds={"text": kind}).eval()
    if narrow is not None:
        model.get_submodule(narrow).to(torch.bfloat16)
    rows = Rows(model, "text", 20, 64, {"speech": 64}, model.specials["text"].pad)
    tower = model.tower("text")
    copied = weights_as(copy_of(tower, False), weights, rows=20, compiled=True)
    Step(model, "text", copied, rows, like_cache(tower), compile=True)
    assert rows.reach.chooses is chooses


def test_a_row_that_joins_late_sees_all_of_its_memory() -> None:
    """One that reads more than those before, and one whose memory lies beyond a grain."""
    model = often_ending(tiny_model(2, gate=1.0)).eval()
    documents = [doc(("speech", [5 + i % 7 for i in range(size)])) for size in (2, 40, 100)]
    settings = {"text": {"max_new_tokens": 45, "min_new_tokens": 45}}
    want = ids_of(model.generate(documents, ["text"], settings=settings))
    with Engine(model, slots=3, compile=False, memory=120) as engine:
        assert ids_of(model.generate(documents, ["text"], settings=settings, engine=engine)) == want
