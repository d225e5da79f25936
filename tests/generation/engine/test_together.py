"""Documents read in one pass: each has the state that it would have alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import doc, ids_of, often_ending, tiny_model

from zipper_lm import Document, Engine, ZipperModel
from zipper_lm.generation.engine import engine as engine_module
from zipper_lm.generation.engine.together import can_share, companions, pending_tokens, read_together
from zipper_lm.generation.request import Request

RAGGED = [
    doc(("speech", [5, 6, 7, 8, 9, 10, 11]), ("text", [5])),
    doc(("text", [5, 6, 7, 8]), ("speech", [4])),
    doc(("text", [4]), ("speech", [12, 13]), ("text", [7, 8])),
]


def lively(**kwargs: Any) -> ZipperModel:
    return often_ending(tiny_model(gate=1.0, **kwargs)).eval()


def requests_of(model: ZipperModel, documents: list[Document]) -> list[Request]:
    return [Request(model, [Document(list(d))], [set(model.names)]) for d in documents]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_states_are_those_of_each_alone(kind: str) -> None:
    """And they go on alike: positions, places and padding of others leave no trace."""
    model = lively(kinds={"text": kind})
    together, alone = requests_of(model, RAGGED), requests_of(model, RAGGED)
    read_together(together)
    for one, other in zip(together, alone):
        other.read_pending()
        assert one.pending == []
        for request in (one, other):
            request.append("text", [[9, 8]])
            request.read_pending()
        for store in ("segments", "positions", "handover"):
            mine, theirs = getattr(one.state, store), getattr(other.state, store)
            assert mine.keys() == theirs.keys()
            for name in mine:
                torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)
        for pair, memories in other.state.memories.items():
            for mine, theirs in zip(one.state.memories[pair], memories, strict=True):
                torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-5)
        for name, cache in other.state.caches.items():
            for mine, theirs in zip(one.state.caches[name].layers, cache.layers, strict=True):
                torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-5)


def test_companions_are_about_as_long_and_fit() -> None:
    model = lively()
    documents = [doc(("speech", [5] * length)) for length in (8, 30, 9, 7, 8)]
    first, *others = requests_of(model, [*documents, doc(("text", [5] * 8))])
    assert [pending_tokens(r) for r in companions(first, others, 10_000)] == [10, 11, 9]
    assert [pending_tokens(r) for r in companions(first, others, 25)] == [10]
    assert companions(first, others, 5) == []
    with torch.no_grad():
        others[1].read_pending()
    assert [pending_tokens(r) for r in companions(first, others, 10_000)] == [10, 9]


@pytest.mark.parametrize(("kind", "can"), [("llama", True), ("mamba", False), ("lfm2", False)])
def test_only_keys_and_values_in_float32_can_be_cut(kind: str, can: bool) -> None:
    """In bfloat16 a row is rounded otherwise in another batch: a document would depend on who is read beside it."""
    model = lively(kinds={"text": kind})
    assert can_share(model, "text") is can
    assert can_share(model.to(torch.bfloat16), "text") is False


@pytest.mark.parametrize("fails", [False, True])
def test_an_engine_reads_those_that_wait_together(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """One that cannot be read with others leaves none of them unread."""
    model, counts = lively(), []

    def noted(requests: list[Request]) -> None:
        counts.append(len(requests))
        if fails:
            raise ValueError("no")
        read_together(requests)

    monkeypatch.setattr(engine_module, "read_together", noted)
    documents = [doc(("speech", [5 + i] * (6 + i % 3))) for i in range(6)]
    settings = {name: {"max_new_tokens": 6} for name in model.names}
    want = ids_of(model.generate(documents, ["text", "speech"], settings=settings))
    with Engine(model, slots=6, compile=False) as engine:
        with engine._awake:  # all of them come before its next turn
            handles = [engine.submit(d, ["text", "speech"], settings) for d in documents]
        assert ids_of([handle.result(60) for handle in handles]) == want
    assert counts == [6]


def test_short_documents_do_not_wait_until_long_ones_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are read chunk by chunk were always ready, and who was to be read at once had its turn after them."""
    model, settings = lively(), {"text": {"max_new_tokens": 2}}
    with Engine(model, slots=1, compile=False, chunk=8) as engine:
        engine.submit(doc(("speech", [5])), ["text"], settings).result(60)  # what is learned once is learned
        with engine._awake:
            long = [engine.submit(doc(("speech", [5] * 150)), ["text"], settings) for _ in range(4)]
            short = engine.submit(doc(("speech", [5])), ["text"], settings)
        short.result(60)
        assert not any(handle.done() for handle in long)
        engine.close(cancel=True)
