import itertools
import random
from typing import Literal

import pytest
import torch
from tiny import doc, tiny_model

from zipper_lm import ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.fusion import reading
from zipper_lm.fusion.reading import State, read, rows_that_see, visible, visible_between


def test_visible_by_hand() -> None:
    readers, sources = torch.tensor([[0, 0, 2, -1]]), torch.tensor([[-1, 1, 1, 3]])
    assert visible(readers, sources).int().tolist() == [[[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]]


@torch.no_grad()
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("source_layers", [None, "embeddings"])
def test_reading_in_parts_is_reading_at_once(source_layers: Literal["embeddings"] | None, context: int) -> None:
    model = tiny_model(3, gate=0.7, zips=ZipSpec(layers=3, source_layers=source_layers, context=context))
    document = [("text", [4, 5]), ("speech", [6, 7, 8]), ("image", [9]), ("text", [10, 11]), ("speech", [12])]
    whole = read(model, collate([doc(*document)], model.specials)).logits
    state, parts = State(), {"text": [], "speech": [], "image": []}
    for number, (name, ids) in enumerate(document):
        batch = collate([doc((name, ids))], model.specials, involved=[{"text", "speech", "image"}])
        batch[name]["segments"] += number
        parts[name].append(read(model, batch, state).logits[name])
    for name, logits in whole.items():
        torch.testing.assert_close(torch.cat(parts[name], 1), logits, rtol=1e-4, atol=1e-4)
    assert {n: s.shape[1] for n, s in state.segments.items()} == {"text": 8, "speech": 8, "image": 3}
    for (_, source), memories in state.memories.items():
        assert all(m.keys.shape[2] == state.segments[source].shape[1] for m in memories)


@torch.no_grad()
@pytest.mark.parametrize(("source_layers", "same"), [(None, False), ("embeddings", True)])
def test_embeddings_say_what_a_token_is_whatever_stands_before_it(
    source_layers: Literal["embeddings"] | None, same: bool
) -> None:
    """The demo spoke wrong words of the right kind: a text tower's states say what comes next, and the word drowned."""
    model = tiny_model(gate=0.7, zips=ZipSpec(layers=3, source_layers=source_layers))
    made = []
    for before in (4, 9):
        state = State()
        read(model, collate([doc(("text", [before, 5, 6]))], model.specials), state)
        made.append(state.memories["speech", "text"])
    for one, other in zip(*made):
        assert torch.equal(one.values[:, :, 2:], other.values[:, :, 2:]) == same
        assert not torch.equal(one.values[:, :, 1], other.values[:, :, 1])
    with torch.no_grad():
        bare = model.tower("text").backbone.get_input_embeddings()(torch.tensor([[0, 9, 5, 6, 1]]))
        own = model.zip_layer("speech", "text", 0).remember(bare, torch.arange(5)[None])
    assert torch.equal(own.values, made[1][0].values) == same


@torch.no_grad()
def test_forgetting_a_tower() -> None:
    model = tiny_model(gate=0.7)
    documents = [doc(("text", [4, 5]), ("speech", [6, 7, 8]))]
    state = State()
    read(model, collate(documents, model.specials), state)
    handover = state.handover["speech"].clone()
    state.forget("speech")
    assert set(state.caches) == set(state.segments) == {"text"}
    assert {source for _, source in state.memories} == {"text"}
    read(model, collate(documents, model.specials, towers=["speech"]), state)
    torch.testing.assert_close(state.handover["speech"], handover)


@torch.no_grad()
def test_a_state_costs_nothing_where_none_is_asked_for() -> None:
    model = tiny_model(gate=0.7)
    batch = collate([doc(("text", [4, 5]), ("speech", [6]))], model.specials)
    calls = []
    for layer in model.zips["text"]["speech"]:
        layer.memory_projection.register_forward_hook(lambda *_: calls.append(1))
    read(model, collate([doc(("text", [4, 5]))], model.specials))
    assert not calls  # nobody speaks, nobody listens
    read(model, batch)
    assert len(calls) == 3  # once per zip layer


MIXED = [
    [("text", [4, 5]), ("speech", [6, 7, 8])],
    [("speech", [9, 10]), ("text", [11, 12, 13])],
    [("text", [4, 6]), ("speech", [7])],
    [("speech", [9, 12, 3, 4])],
]


@pytest.mark.parametrize("layouts", [MIXED, MIXED[:1], MIXED[3:], MIXED[1:2] * 2])
def test_rows_that_see_nothing_change_nothing_but_the_time(layouts, monkeypatch):
    """In training a zip works on the rows that see something; losses and gradients are those of all rows."""
    model = tiny_model(gate=0.7, train={"text": "full", "speech": "full"})
    batch = collate([doc(*layout) for layout in layouts], model.specials)
    results = []
    for skipping in (True, False):
        if not skipping:
            monkeypatch.setattr(reading, "rows_that_see", lambda *_: None)
        model.zero_grad()
        loss = torch.stack([x.float().log_softmax(-1)[..., 3].mean() for x in read(model, batch).logits.values()]).sum()
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (ours, gradients), (theirs, all_gradients) = results
    torch.testing.assert_close(ours, theirs)
    for name, gradient in all_gradients.items():
        if gradient is None:
            assert gradients[name] is None, name
        else:
            torch.testing.assert_close(gradients[name], gradient, msg=name)


def test_a_zip_works_on_the_rows_that_see_something(monkeypatch):
    model = tiny_model(gate=0.7)
    rows: dict[str, int] = {}
    for reader, source in model.layer_pairs:
        model.zip_layer(reader, source, 0).register_forward_hook(
            lambda layer, args, out, key=reader: rows.__setitem__(key, len(out))
        )
    batch = collate([doc(*layout) for layout in MIXED], model.specials)
    read(model, batch)
    assert rows == {"text": 1, "speech": 2}
    with torch.no_grad():
        read(model, batch)
    assert rows == {"text": 4, "speech": 4}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_that_see_are_those_in_which_something_is_visible(packing: bool, side: Literal["left", "right"]) -> None:
    """They are found without the pairs of all tokens; several documents in a row count apart."""
    draw, model = random.Random(0), tiny_model(3)
    found = set()
    for _ in range(40):
        layouts = [
            [(draw.choice(["text", "speech", "image"]), [4] * draw.randint(0, 5)) for _ in range(draw.randint(1, 4))]
            for _ in range(draw.randint(1, 6))
        ]
        batch = collate([doc(*layout) for layout in layouts], model.specials, side=side, packing=packing)
        for reader, source in itertools.permutations(batch, 2):
            sees = visible_between(batch[reader], batch[source]).flatten(1).any(1)
            rows = rows_that_see(batch[reader], batch[source])
            want = [0] if not sees.any() else sees.nonzero()[:, 0].tolist()
            assert want == (list(range(len(sees))) if rows is None else rows.tolist())
            found.add((bool(sees.any()), bool(sees.all()), rows is None))
    assert len(found) == 3
