"""Tasks: templates, documents made from rows, and the mixture's draws."""

import math
from collections import Counter

import pytest
from torch.utils.data import DataLoader

from zipper_lm.data.document import Document, Segment
from zipper_lm.data.sources.readers import read_rows
from zipper_lm.data.tasks import Task, TaskMixture, build_document, parse_task

TOWERS = ["speech", "text", "image"]
ROWS = [{"speech": f"{i}.wav", "text": f"text {i // 2}"} for i in range(7)]  # pairs say the same, the last is alone


def values(document):
    return [(s.modality, s.value) for s in document]


@pytest.mark.parametrize(
    ("text", "given", "targets"),
    [
        ("speech->text", ("speech",), ("text",)),
        (" text + image -> speech ", ("text", "image"), ("speech",)),
        ("speech->text->speech", ("speech",), ("text", "speech")),
        ("->speech", (), ("speech",)),
    ],
)
def test_templates(text, given, targets):
    task = parse_task(text, TOWERS)
    assert task == Task(given, targets)
    assert parse_task(str(task)) == task


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text", "has no arrow"),
        ("", "has no arrow"),
        ("speech>text", "has no arrow"),
        ("->", "has an empty name"),
        ("+->text", "has an empty name"),
        ("speech->", "has an empty name"),
        ("speech->->text", "has an empty name"),
        ("speech+->text", "has an empty name"),
        ("speech->text+image", r"a \+ after the first arrow"),
        ("speech-->text", "'speech-' is no modality name"),
        ("speech text->text", "'speech text' is no modality name"),
        ("speech->video", r"unknown modality 'video'; the towers are \['image', 'speech', 'text'\]"),
        (3, "must be a string"),
    ],
)
def test_bad_templates(text, message):
    with pytest.raises(ValueError, match=f"task .*{message}"):
        parse_task(text, TOWERS)


def test_given_and_targets_are_marked():
    document = build_document("text+image->speech", {"speech": "a.wav", "text": "a", "image": "a.png", "id": 3})
    assert values(document) == [("text", "a"), ("image", "a.png"), ("speech", "a.wav")]
    assert [s.target for s in document] == [False, False, True]


def test_later_segment_of_a_modality_comes_from_a_twin():
    task = parse_task("speech->text->speech->speech")
    alone = build_document(task, ROWS[0])
    assert [s.value for s in alone] == ["0.wav", "text 0", "0.wav", "0.wav"]
    twice = build_document(task, ROWS[0], {"speech": [ROWS[1]]})
    assert [s.value for s in twice] == ["0.wav", "text 0", "1.wav", "0.wav"]


def test_rows_of_segments_lend_their_ids():
    known = Segment("speech", value="a.wav", ids=[1, 2])
    row = {"speech": known, "text": "a"}
    document = build_document("text->speech", row)
    assert document[1] == Segment("speech", value="a.wav", ids=[1, 2], target=True)
    assert known.target is False


def test_row_that_lacks_a_modality():
    with pytest.raises(ValueError, match=r"task 'speech->text': the row has no 'text'; it has \['speech'\]"):
        build_document("speech->text", {"speech": "a.wav"})
    with pytest.raises(ValueError, match="the row has no 'image'"):
        TaskMixture(ROWS, {"image->text": 1})


def test_mixture_follows_the_weights():
    rows = [{"speech": "a.wav", "text": "a"}] * 2000
    mixture = TaskMixture(rows, {"speech->text": 3, "text->speech": 1, "speech->text->speech": 0})
    counts = Counter(tuple(document.modalities) for document in mixture)
    assert set(counts) == {("speech", "text"), ("text", "speech")}
    assert abs(counts["speech", "text"] / 2000 - 0.75) < 0.04  # four standard deviations


def test_draws_depend_on_seed_epoch_and_index_alone():
    weights = {"speech->text": 1, "text->speech": 1}
    rows = ROWS * 10
    mixture, again = TaskMixture(rows, weights, seed=3), TaskMixture(rows, weights, seed=3)
    first = [d.modalities for d in mixture]
    assert [again[i].modalities for i in reversed(range(len(rows)))] == first[::-1]
    assert mixture[-1].modalities == first[-1]
    mixture.set_epoch(1)
    second = [d.modalities for d in mixture]
    assert second != first
    mixture.set_epoch(0)
    assert [d.modalities for d in mixture] == first
    assert [d.modalities for d in TaskMixture(rows, weights, seed=4)] != first
    with pytest.raises(IndexError):
        mixture[len(rows)]


def test_twins_are_other_rows_with_the_same_text():
    mixture = TaskMixture(ROWS, {"speech->text->speech": 1})
    for i, document in enumerate(mixture):
        twin = i if i == 6 else i ^ 1
        assert values(document) == [("speech", f"{i}.wav"), ("text", f"text {i // 2}"), ("speech", f"{twin}.wav")]
        assert [s.target for s in document] == [False, True, True]


def test_twins_vary_between_epochs():
    rows = [{"speech": f"{i}.wav", "text": "same"} for i in range(20)]
    mixture = TaskMixture(rows, {"speech->text->speech": 1})
    seen = set()
    for epoch in range(10):
        mixture.set_epoch(epoch)
        seen.add(mixture[0][2].value)
    assert len(seen) > 3
    assert "0.wav" not in seen


def test_rows_without_equal_strings_are_no_twins():
    mixture = TaskMixture([{"speech": b"RIFF", "text": "a"}] * 2, {"text->speech->text": 1})
    assert values(mixture[0]) == [("text", "a"), ("speech", b"RIFF"), ("text", "a")]
    only_text = TaskMixture([{"text": "a"}, {"text": "b"}], {"text->text": 1})
    assert values(only_text[0]) == [("text", "a"), ("text", "a")]


def test_twins_through_readers():
    mixture = TaskMixture(
        read_rows([{"audio": r["speech"], "sentence": r["text"]} for r in ROWS]), {"speech->text->speech": 1}
    )
    assert [s.value for s in mixture[2]] == ["2.wav", "text 1", "3.wav"]


def test_interleaving_joins_two_rows():
    mixture = TaskMixture(ROWS, {"speech->text": 1}, interleave=1.0)
    for i, document in enumerate(mixture):
        assert document.modalities == ["speech", "text", "speech", "text"]
        assert [s.target for s in document] == [False, True, False, True]
        assert document[0].value == f"{i}.wav"
        assert document[2].value != document[0].value
    some = TaskMixture(ROWS * 100, {"speech->text": 1}, interleave=0.25)
    share = sum(len(d) == 4 for d in some) / len(some)
    assert abs(share - 0.25) < 0.07
    assert len(TaskMixture(ROWS[:1], {"speech->text": 1}, interleave=1.0)[0]) == 2


def test_whole_documents_pass_unchanged():
    whole = Document([Segment("text", "a"), Segment("speech", "a.wav", target=True)])
    assert TaskMixture([whole], {})[0] is whole
    mixed = TaskMixture([whole, ROWS[0], ROWS[1]], {"speech->text->speech": 1}, interleave=1.0)
    assert mixed[0] is whole
    assert mixed[1][2].value == "1.wav"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"speech->text": 0}}, "at least one task a weight above zero"),
        ({"weights": {}}, "at least one task a weight above zero"),
        ({"weights": {"speech->text": -1}}, "weight of 'speech->text' must be a finite number from 0, got -1"),
        ({"weights": {"speech->text": math.nan}}, "must be a finite number"),
        ({"weights": {"speech->text": math.inf}}, "must be a finite number"),
        ({"weights": {"speech->text": "1"}}, "must be a finite number"),
        ({"weights": {"speech->text": True}}, "must be a finite number"),
        ({"weights": {"speech->video": 1}, "towers": TOWERS}, "unknown modality 'video'"),
        ({"rows": []}, "there are no rows"),
        ({"seed": -1}, "seed must be a whole number from 0, got -1"),
        ({"interleave": 1.5}, "interleave must be between 0 and 1, got 1.5"),
        ({"interleave": math.nan}, "interleave must be between 0 and 1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        TaskMixture(**({"rows": ROWS, "weights": {"speech->text": 1}} | change))


def test_row_among_documents_needs_a_task():
    whole = Document([Segment("text", "a", target=True)])
    with pytest.raises(ValueError, match="at least one task"):
        TaskMixture([whole, ROWS[0]], {})


def test_workers_that_outlive_an_epoch_see_the_new_one():
    mixture = TaskMixture(ROWS * 4, {"speech->text": 1, "text->speech": 1})
    loader = DataLoader(mixture, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        mixture.set_epoch(epoch)
        assert [d.modalities for d in loader] == [d.modalities for d in mixture]
