"""A CUDA graph of a step, with what is CUDA's replaced: that warming up and capturing leave no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import doc, ids_of, limits, often_ending, tiny_model
from torch import Tensor

from zipper_lm import Engine, ZipperModel
from zipper_lm.generation.engine import step
from zipper_lm.generation.engine.graph import WARM, Graph


class Here:
    """In place of a stream and of a graph."""

    def __init__(self, *_: Any) -> None:
        self.run: Callable[[], Tensor] | None = None

    def wait_stream(self, other: Any) -> None: ...


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture runs the function here, which is more than one on a GPU does."""

    @contextlib.contextmanager
    def nothing(*_: Any, **__: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Here)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Here)
    monkeypatch.setattr(torch.cuda, "current_stream", Here)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "graph", nothing)


class Again(Graph):
    """A graph that runs its function again."""

    made = 0

    def __init__(self, run: Callable[[], Tensor], *more: Any) -> None:
        Again.made += 1
        self.run = run
        super().__init__(run, *more)

    def __call__(self) -> Tensor:
        return self.run()


def test_the_state_is_as_before(without_cuda: None) -> None:
    count, calls = torch.zeros(1), []

    def run() -> Tensor:
        calls.append(int(count))
        return count.add_(1)

    Graph(run, [count])
    assert calls == [0] * (WARM + 1)
    assert int(count) == 0


def test_a_failure_leaves_the_state_as_before(without_cuda: None) -> None:
    count = torch.zeros(1)

    def run() -> Tensor:
        count.add_(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        Graph(run, [count])
    assert int(count) == 0


DOCUMENTS = [doc(("speech", [5, 6, 7, 8, 9])), doc(("speech", [7, 8, 4]))]
MORE: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5},
    {"do_sample": True, "top_k": 5, "seed": 3},
    {"guidance_scale": 1.7},
    {"output_scores": True},
]


def both_ways(model: ZipperModel, **more: Any) -> tuple[Any, Any]:
    """What the plain path writes, and what an engine does."""
    settings = limits(model, 9, **more)
    plain = model.generate(DOCUMENTS, ["text"], settings=settings)
    with Engine(model, slots=4, compile=False) as engine:
        return ids_of(plain), ids_of(model.generate(DOCUMENTS, ["text"], settings=settings, engine=engine))


@pytest.fixture
def lively() -> ZipperModel:
    return often_ending(tiny_model(gate=1.0)).eval()


@pytest.mark.parametrize("more", MORE, ids=lambda more: ",".join(more) or "greedy")
def test_steps_write_what_they_write_without(
    more: dict[str, Any], lively: ZipperModel, without_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a step changes and reads again must be put back after each call that warms up."""
    monkeypatch.setattr(step, "graph_pool", lambda device: (0, 1))
    monkeypatch.setattr(step, "Graph", Again)
    monkeypatch.setattr(Again, "made", 0)
    plain, written = both_ways(lively, **more)
    assert Again.made > 0
    assert written == plain


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_recurrent_states_are_put_back(kind: str, without_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column that is written again is the same; a state would have read a token again for each call that warms up."""
    monkeypatch.setattr(step, "graph_pool", lambda device: (0, 1))
    monkeypatch.setattr(step, "Graph", Again)
    plain, written = both_ways(often_ending(tiny_model(gate=1.0, kinds={"text": kind})).eval())
    assert written == plain


def test_what_cannot_be_captured_is_run(
    lively: ZipperModel, without_cuda: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(step, "graph_pool", lambda device: (0, 1))
    monkeypatch.setattr(step, "Graph", refuse)
    plain, written = both_ways(lively)
    assert written == plain
    assert "no CUDA graph" in caplog.text
