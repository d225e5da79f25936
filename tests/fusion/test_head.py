"""Logits of single states, and losses that never hold those of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import doc, tiny_backbone, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zipper_lm import Document
from zipper_lm.data.collation import Batch, collate
from zipper_lm.fusion import head
from zipper_lm.fusion.head import head_of
from zipper_lm.fusion.interface import learn
from zipper_lm.fusion.reading import read, tower_head

KINDS = ["llama", "gpt2", "gpt2-tied", "gemma2", "qwen3", "lfm2", "mamba"]

DOCUMENTS = [
    doc(("text", [5, 6, 7]), ("speech", [10, 11, 12, 13]), target=True),
    doc(("speech", [4, 5, 6]), ("text", [3, 4, 7, 8, 9, 10, 11]), target=True),
    doc(("text", [4]), ("speech", [20, 21]), ("text", [9, 8, 7]), target=True),
]


class _Largest(TorchDispatchMode):
    """Notes the most rows of any tensor whose last size is `ids`; where a head's own matrix lies otherwise, as a
    product sees it, is not counted."""

    def __init__(self, ids: int, hidden: int) -> None:
        super().__init__()
        self.ids, self.hidden, self.rows = ids, hidden, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            own = isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-2:] != (self.hidden, self.ids)
            if own and tensor.shape[-1] == self.ids:
                self.rows = max(self.rows, tensor.numel() // self.ids)
        return made


@contextmanager
def at_once(monkeypatch: pytest.MonkeyPatch, numbers: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(head, "HELD", numbers)
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_gives_what_a_forward_gives(kind: str) -> None:
    """Softcaps, scales and final norms are the family's own; no list names them."""
    model = tiny_model(gate=0.5, kinds={"text": kind})
    batch = collate(DOCUMENTS, model.specials)
    with torch.no_grad():
        reading = read(model, batch)
        for name, logits in reading.logits.items():
            apart = tower_head(model.tower(name))
            assert apart is not None
            torch.testing.assert_close(apart(reading.finals[name].flatten(0, 1)), logits.flatten(0, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packing", [False, True])
def test_losses_and_gradients_are_those_of_whole_logits(
    kind: str, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packing and kind in ("lfm2", "mamba"):
        pytest.skip("runs on from one document into the next")
    model = tiny_model(gate=0.5, kinds={"text": kind}, train={"text": "full", "speech": "full"})
    batch = collate(DOCUMENTS, model.specials, packing=packing)
    found = []
    for numbers in (head.HELD, 100):  # 3 targets of text at a time, 1 of speech
        model.zero_grad()
        with at_once(monkeypatch, numbers):
            output = model(batch, return_logits=False)
        assert output.logits is None
        output.loss.backward()
        found.append((output.losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (whole, gradients), (parts, others) = found
    assert whole.keys() == parts.keys() == {"text", "speech", "handover"}
    assert gradients.keys() == others.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_logits_of_a_batch_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 documents of 512 tokens and 128 thousand ids were 4 GiB of logits in bfloat16, most of them of no target."""
    model = tiny_model(gate=0.5, kinds={"speech": "llama"}, train={"text": "full"})
    assert all(tower_head(model.tower(name)) is not None for name in model.names)  # tried, on 15 tokens
    batch = collate(DOCUMENTS, model.specials)
    rows = []
    for logits in (True, False):
        with at_once(monkeypatch, 5 * 31), _Largest(31, 32) as largest:
            model(batch, return_logits=logits).loss.backward()
        rows.append(largest.rows)
    assert rows == [batch["text"]["input_ids"].numel(), 5]


def test_where_all_can_be_held_nothing_changes() -> None:
    """Bit for bit: parts round otherwise."""
    model = tiny_model(gate=0.5)
    batch = collate(DOCUMENTS, model.specials)
    with torch.no_grad():
        assert torch.equal(model(batch, return_logits=False).loss, model(batch).loss)


def test_towers_whose_head_needs_more_hold_their_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a family does after its layers may look back at its embeddings: states alone would give other logits."""

    def looks_back(model: Any, args: Any, kwargs: Any, output: Any) -> Any:
        output.logits = output.logits + kwargs["input_ids"][:, -output.logits.shape[1] :, None]
        return output

    backbone = tiny_backbone("llama", 31)
    backbone.register_forward_hook(looks_back, with_kwargs=True)
    assert head_of(backbone, learn(backbone)) is None
    model = tiny_model(gate=0.5)
    model.tower("text").backbone.register_forward_hook(looks_back, with_kwargs=True)
    batch = collate(DOCUMENTS, model.specials)
    with torch.no_grad():
        whole = model(batch).losses
        with at_once(monkeypatch, 100):
            parts = model(batch, return_logits=False).losses
    assert torch.equal(parts["text"], whole["text"])
    torch.testing.assert_close(parts["speech"], whole["speech"])


@pytest.mark.parametrize("groups", [None, [["text", "speech"], ["text", "image"]]])
def test_combined_trainings_and_three_towers(groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(3, gate=0.5)
    model.config.groups = groups or model.config.groups
    documents: list[Document] = [*DOCUMENTS, doc(("image", [4, 5]), ("text", [6, 7]), target=True)]
    batch: Batch = collate(documents, model.specials)
    with torch.no_grad():
        whole = model(batch).losses
        with at_once(monkeypatch, 100):
            parts = model(batch, return_logits=False).losses
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_a_head_asks_a_device_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on meta could not say."""
    model = tiny_model(gate=0.5)
    assert all(tower_head(model.tower(name)) is not None for name in model.names)  # tried where there are numbers
    batch = collate(DOCUMENTS, model.specials).to("meta")
    with at_once(monkeypatch, 100):
        model.to("meta")(batch, return_logits=False).loss.backward()
