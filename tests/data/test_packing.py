"""Documents that share rows: which of them, and where their tokens stand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import doc

from zipper_lm.data.collation import ABSENT, Specials, collate
from zipper_lm.data.document import Document
from zipper_lm.data.packing import best_fit, places, sight

SPECIALS = {"text": Specials(0, 1, 2), "speech": Specials(0, 1, 3)}


def test_each_row_is_filled_by_what_leaves_the_least_room() -> None:
    lengths = np.array([[10], [3], [6], [4], [7], [1]])
    assert best_fit(lengths, "aaaaaa") == [[0], [1, 4], [2, 3], [5]]
    two = np.array([[10, 2], [3, 1], [6, 9], [4, 1], [7, 2], [1, 1]])
    assert best_fit(two, "aabaaa") == [[0], [2], [1, 4], [3, 5]], "no stream may be longer than 10, no kinds be mixed"


def test_documents_share_rows_where_zips_have_work_for_all_of_them_or_none() -> None:
    listen, speak = doc(("speech", [4]), ("text", [5])), doc(("text", [5]), ("speech", [4]))
    assert sight(listen) == {("text", "speech")}
    assert sight(doc(("text", [5]), ("text", [6]))) == frozenset()
    long = doc(("speech", list(range(4, 30))), ("text", [5]))
    batch = collate([long, listen, speak, listen, speak], SPECIALS, packing=True)
    rows = [sorted(set(row.tolist()) - {ABSENT}) for row in batch["text"]["documents"]]
    assert rows == [[0], [1, 3], [2, 4]]
    assert batch["text"]["involved"].shape == (3, 2)


def test_a_row_says_where_each_token_stands() -> None:
    first = doc(("speech", [4] * 9), ("text", [5]))
    second = doc(("text", [6]), ("speech", [9]), ("text", []))
    third = doc(("text", []), ("speech", []), ("text", []))
    text = {
        key: value.tolist() for key, value in collate([first, second, third], SPECIALS, packing=True)["text"].items()
    }
    assert text["documents"] == [[0, 0, 0, *[-1] * 6], [1, 1, 1, 1, 1, 2, 2, 2, 2]]
    assert text["input_ids"][1] == [0, 6, 1, 0, 1, 0, 1, 0, 1]
    assert text["segments"][1] == [0, 0, 0, 2, 2, 0, 0, 2, 2]
    assert text["positions"][1] == [0, 1, 2, 0, 1, 0, 1, 0, 1]


documents_ = st.lists(
    st.lists(
        st.tuples(st.sampled_from(["text", "speech"]), st.lists(st.integers(4, 9), max_size=6), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=8,
)


@given(documents_, st.sampled_from(["left", "right"]))
def test_what_is_in_the_rows_is_what_was_given(drawn: Any, side: Any) -> None:
    """Every document's tokens, wherever they lie, are those of a row of its own, in their order."""
    documents = []
    for segments in drawn:
        made = doc(*((name, ids) for name, ids, _ in segments))
        for segment, (_, _, target) in zip(made, segments):
            segment.target = target
        documents.append(made)
    plain, packed = (collate(documents, SPECIALS, side=side, packing=on) for on in (False, True))
    longest = max(stream["input_ids"].shape[1] for stream in plain.values())
    assert plain.keys() == packed.keys()
    for name, stream in packed.items():
        assert stream["input_ids"].shape[1] <= longest
        assert (stream["documents"] >= 0).equal(stream["segments"] >= 0)
        for number in range(len(documents)):
            alone, here = plain[name]["segments"][number] >= 0, stream["documents"] == number
            assert int(here.any(1).sum()) <= 1
            for key in ("input_ids", "segments", "positions", "labels", "handover", "attention_mask"):
                assert stream[key][here].equal(plain[name][key][number][alone]), key
            assert places(stream["documents"])[here].equal(torch.arange(int(here.sum())))
            if here.any():
                row = here.any(1).nonzero()[0, 0]
                assert stream["involved"][row].equal(plain[name]["involved"][number])


def test_what_is_being_written_is_not_packed() -> None:
    with pytest.raises(ValueError, match="packing is for finished documents, and open_last goes on"):
        collate([Document([("text", "x")])], SPECIALS, packing=True, open_last=True)


def test_places_begin_anew_with_each_document() -> None:
    documents = torch.tensor([[3, 3, 0, 0, 0, -1, -1], [-1, -1, 2, 2, 5, 7, 7]])
    assert places(documents).tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 0, 1, 0, 0, 1]]
