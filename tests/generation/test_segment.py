"""Where a tower that writes stands in its own stream."""

from types import SimpleNamespace

import torch

from tests.tiny import doc, ids_of, tiny_model
from zipper_lm.generation.request import Request
from zipper_lm.generation.segment import _Place


def test_proposed_tokens_do_not_move_the_place() -> None:
    """Before each forward of assisted decoding, transformers 5.17 asks the stopping criteria about tokens that are only
    proposed: queries stood behind them, and prompt lookup wrote other tokens than greedy search."""
    speaker = SimpleNamespace(next=0, has_read=False)
    place = _Place(speaker, cached=True)  # type: ignore[arg-type]
    places = []
    for forward, length in ((False, 13), (True, 11), (False, 14), (True, 12)):
        speaker.has_read |= forward
        place(torch.zeros(1, length, dtype=torch.long), None)
        places.append(speaker.next)
    assert places == [0, 10, 10, 11]


def test_what_is_suppressed_beyond_the_towers_ids_changes_nothing() -> None:
    """Suppressed ids became one index into the scores, which an id that the tower does not have would fall out of."""
    model = tiny_model(gate=0.5)
    given = [doc(("speech", [5, 6, 7]))]
    how = {"max_new_tokens": 6, "min_new_tokens": 6}
    plain = ids_of(model.generate(given, ["text"], settings={"text": how}))
    assert ids_of(model.generate(given, ["text"], settings={"text": {**how, "suppress_tokens": [900]}})) == plain
    first = plain[0][-1][1][0]
    other = ids_of(model.generate(given, ["text"], settings={"text": {**how, "suppress_tokens": [first]}}))
    assert first not in other[0][-1][1]


def test_what_is_remembered_lies_head_by_head() -> None:
    """Keys and values kept the layout of the projection, and a batch of 32 waited for them at every token."""
    model = tiny_model(gate=0.5)
    documents = [doc(("speech", [5, 6, 7]))]
    request = Request(model, documents, [{"text", "speech"}])
    with torch.no_grad():
        request.read_pending()
    memories = [m for each in request.state.memories.values() for m in each]
    assert memories
    assert all(m.keys.is_contiguous() and m.values.is_contiguous() for m in memories)
