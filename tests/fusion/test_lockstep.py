import pytest
import torch
from tiny import doc, tiny_model

from zipper_lm.data.collation import collate
from zipper_lm.fusion.lockstep import lockstep


class Boom(Exception):
    pass


def play(script: dict, needs: dict, posts: dict) -> list[str]:
    """Towers that are plain loops; returns the order of events."""
    events: list[str] = []

    def forward(name: str, depth: int):  # type: ignore[no-untyped-def]
        def run(listener):  # type: ignore[no-untyped-def]
            state = torch.zeros(1)
            state = listener.before(0, state)
            for layer in range(depth):
                events.append(f"{name}{layer}")
                state = listener.after(layer, state)
            return state

        return run

    lockstep(
        {n: forward(n, d) for n, d in script.items()},
        {},
        posts,
        needs,
        lambda name, depth, h: h,
        lambda name, depth, h: (events.append(f"zip {name}{depth}"), h)[1] if depth in needs.get(name, {}) else h,
    )
    return events


def test_a_zip_waits_for_what_it_reads() -> None:
    events = play(
        {"a": 3, "b": 4, "c": 2},
        needs={"a": {1: [("b", 3)], 2: [("c", 1)]}, "c": {0: [("b", 0)]}, "b": {0: [("a", 0)]}},
        posts={"a": {0}, "b": {0, 3}, "c": {1}},
    )
    for zipped, posted in (("zip a1", "b3"), ("zip a2", "c1"), ("zip c0", "b0"), ("zip b0", "a0")):
        assert events.index(posted) < events.index(zipped)
    assert len([e for e in events if not e.startswith("zip")]) == 9


def test_crossed_needs_are_caught() -> None:
    with pytest.raises(AssertionError, match="wait for each other"):
        play({"a": 2, "b": 2}, {"a": {0: [("b", 1)]}, "b": {0: [("a", 1)]}}, {"a": {1}, "b": {1}})


@pytest.mark.parametrize("name", ["text", "speech"])
def test_an_error_in_one_tower_leaves_nothing_behind(name: str) -> None:
    model = tiny_model(gate=0.5)
    batch = collate([doc(("speech", [5, 6]), ("text", [4]), ("speech", [9]))], model.specials)
    expected = {n: v.clone() for n, v in model(batch).logits.items()}
    layer = model.tower(name).layers[1]

    def fail(*_: object) -> None:
        raise Boom

    handle = layer.register_forward_hook(fail)
    with pytest.raises(Boom):
        model(batch)
    with pytest.raises(Boom):
        model.generate([doc(("speech", [5, 6]), ("text", [4]))], ["text"], settings={"text": {"max_new_tokens": 2}})
    handle.remove()
    assert all(torch.equal(model(batch).logits[n], expected[n]) for n in expected)
    bare = model.tower(name).backbone(input_ids=torch.tensor([[0, 4, 5]])).logits
    assert torch.equal(bare, tiny_model().tower(name).backbone(input_ids=torch.tensor([[0, 4, 5]])).logits)
