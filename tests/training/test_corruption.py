"""Corruption is a function of seed, epoch and index, and of what is read alone."""

from __future__ import annotations

from zipper_lm import Document, Segment
from zipper_lm.data.collation import IGNORED, Specials, collate
from zipper_lm.training.corruption import CorruptedDocuments

SPECIALS = {"text": Specials(0, 1, 2), "speech": Specials(0, 1, 2)}


def noisy(
    corrupt: float | dict[str, float] = 0.0, history_dropout: float | dict[str, float] = 0.0
) -> CorruptedDocuments:
    given, target = list(range(10, 50)), list(range(50, 90))
    documents = [
        Document([Segment("speech", ids=given), Segment("text", ids=target, target=True), Segment("text", ids=[5, 6])])
        for _ in range(3)
    ]
    return CorruptedDocuments(
        documents,  # type: ignore[arg-type]
        SPECIALS,
        corrupt=corrupt,
        history_dropout=history_dropout,
        sizes={"text": 100, "speech": 100},
        seed=1,
    )


def test_corruption_hits_given_segments_only_and_can_be_repeated() -> None:
    data = noisy(corrupt=0.5)
    first = data[0]
    lost = sum(i == 2 for i in first[0].ids or [])
    assert 5 < lost < 35
    assert first[1].ids == list(range(50, 90))
    assert first[2].ids == [5, 6]  # too short to lose anything
    assert data[0][0].ids == first[0].ids != data[1][0].ids
    data.set_epoch(1)
    assert data[0][0].ids != first[0].ids
    data.set_epoch(0)
    assert data[0][0].ids == first[0].ids
    assert noisy()[0][0].ids == list(range(10, 50))
    assert noisy({"speech": 0.5})[0][0].ids == first[0].ids
    assert noisy({"text": 0.5})[0][0].ids == list(range(10, 50))


def test_history_dropout_changes_what_a_target_reads_not_what_it_shall_write() -> None:
    data, whole = noisy(history_dropout=0.5), list(range(50, 90))
    first = data[0]
    assert first[0].ids == list(range(10, 50))
    assert first[1].labels == whole
    assert 5 < sum(a != b for a, b in zip(first[1].ids or [], whole)) < 35
    assert not set(first[1].ids or []) & set(SPECIALS["text"])
    assert data[0][1].ids == first[1].ids != data[1][1].ids
    stream = collate([first], SPECIALS)["text"]
    assert stream["labels"][0, :43].tolist() == [IGNORED, *whole, SPECIALS["text"].eos, IGNORED]
    assert stream["input_ids"][0, 1:41].tolist() == first[1].ids


def test_a_frozen_towers_history_is_spared() -> None:
    """It cannot learn to cope: with 30 % of its letters wrong, a frozen text tower read worse than it did untrained."""
    data = noisy(history_dropout=0.5)
    del data.sizes["text"]
    assert data[0][1].ids == list(range(50, 90))
    assert data[0][1].labels is None


def test_a_frozen_towers_history_is_misread_where_it_is_named() -> None:
    """A frozen SmolLM2 that read sentences had never seen a slip in training: after its first it went on as it would
    alone. What it misreads stands in other documents: ids drawn from all of its vocabulary say nothing to it."""
    data = noisy(history_dropout={"text": 0.5})
    del data.sizes["text"]
    other = Document([Segment("text", ids=list(range(90, 100)), target=True)])
    data.documents = [data.documents[0], other, other]  # type: ignore[assignment]
    whole = list(range(50, 90))
    read = []
    for seed in range(4):
        data.seed = seed
        read.append(data[0][1].ids)
    assert data[0][1].labels == whole
    assert read[0] != read[1]
    assert {i for ids in read for i in ids or []} - set(whole) <= set(range(90, 100))
    assert any(set(ids or []) & set(range(90, 100)) for ids in read)
    alone = noisy(history_dropout={"text": 0.5})
    del alone.sizes["text"]
    alone.documents = [alone.documents[0], *[Document([Segment("speech", ids=[3])])] * 2]  # type: ignore[assignment]
    assert alone[0][1].ids != whole  # of a mixture of tasks most documents may write something else
    assert set(alone[0][1].ids or []) <= set(whole)
    spared = noisy(history_dropout={"speech": 0.5})
    assert spared[0][1].ids == whole
    assert spared[0][1].labels is None


def test_a_frozen_tower_misreads_the_same_in_each_epoch() -> None:
    """So that what it computes of it can be kept; what a trained one misreads, and what is lost, is drawn anew. Which
    document of a mixture an epoch makes of a row changes nothing."""
    data = noisy(corrupt=0.5, history_dropout={"text": 0.5, "speech": 0.5})
    data.documents = [*data.documents, Document([Segment("speech", ids=list(range(20, 60)), target=True)])]  # type: ignore[assignment, misc]
    del data.sizes["text"]
    first, spoken = data[0], data[3][0].ids
    assert [[s.ids for s in form if s.target] for form in data.forms(0)] == [[first[1].ids]]
    assert data.forms(0)[0][0].ids == list(range(10, 50))
    data.set_epoch(1)
    assert data[0][1].ids == first[1].ids
    assert data[0][0].ids != first[0].ids
    assert data[3][0].ids != spoken
    assert data[1][1].ids != first[1].ids


def test_one_share_and_the_same_by_name_draw_alike() -> None:
    """Of towers that are trained."""
    assert noisy(history_dropout={"text": 0.5})[0][1].ids == noisy(history_dropout=0.5)[0][1].ids
