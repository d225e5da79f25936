"""Tasks: templates, and documents made from rows."""

import pytest

from zipper_lm.data.document import Segment
from zipper_lm.data.tasks import Task, build_document, parse_task

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
