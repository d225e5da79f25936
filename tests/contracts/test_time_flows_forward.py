"""Contract 7: a token never influences an earlier one, in any tower, in any document layout."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import bare_logits, doc, tiny_model

from zipper_lm.data.collation import collate

MODELS = {n: tiny_model(n, gate=1.0, seed=n) for n in (2, 3)}
NAMES = ["text", "speech", "image"]


def layouts(towers: int) -> st.SearchStrategy:
    segment = st.tuples(st.sampled_from(NAMES[:towers]), st.lists(st.integers(3, 30), max_size=4))
    return st.lists(segment, min_size=1, max_size=5).filter(lambda d: any(ids for _, ids in d))


@settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), towers=st.sampled_from([2, 3]), side=st.sampled_from(["left", "right"]))
@torch.no_grad()
def test_no_influence_backwards(data: st.DataObject, towers: int, side: str) -> None:
    model = MODELS[towers]
    layout = data.draw(layouts(towers))
    places = [(s, t) for s, (_, ids) in enumerate(layout) for t in range(len(ids))]
    number, place = data.draw(st.sampled_from(places))
    changed = [(name, list(ids)) for name, ids in layout]
    changed[number][1][place] = (changed[number][1][place] - 3 + data.draw(st.integers(1, 27))) % 28 + 3
    # Beside another document, so that padding takes part.
    other = [(NAMES[0], [3, 4, 5, 6, 7, 8, 9]), (NAMES[1], [3])]
    batches = [collate([doc(*d), doc(*other)], model.specials, side=side) for d in (layout, changed)]  # type: ignore[arg-type]
    before, after = (model(b).logits for b in batches)
    touched = False
    for name, stream in batches[0].items():
        segments, positions = stream["segments"], stream["positions"]
        earlier = (segments < number) | ((segments == number) & (positions < place + 1))
        earlier &= segments >= 0
        earlier[1] = segments[1] >= 0  # the other document: nothing at all
        assert torch.equal(before[name][earlier], after[name][earlier]), name
        touched |= not torch.equal(before[name], after[name])
    assert touched, "the changed token itself must matter"


@torch.no_grad()
def test_influence_forwards() -> None:
    """What comes earlier in another tower is seen: else the test above would pass with blind zips."""
    model = MODELS[3]
    layout = [("speech", [5, 6, 7]), ("text", [4, 9]), ("image", [8])]
    changed = [("speech", [5, 30, 7]), *layout[1:]]
    before, after = (model(collate([doc(*d)], model.specials)).logits for d in (layout, changed))
    assert not torch.isclose(before["text"], after["text"]).all(-1).any()
    assert not torch.isclose(before["image"], after["image"]).all(-1).any()


@torch.no_grad()
def test_a_segment_does_not_see_itself_from_outside() -> None:
    """The last segment of a document is seen by nobody else: towers that only come earlier stay as without it."""
    model = MODELS[2]
    batch = collate([doc(("text", [5, 6, 7]), ("speech", [4, 9]))], model.specials, involved=[{"text"}])
    assert torch.equal(model(batch).logits["text"], bare_logits(model, "text", batch["text"]))
