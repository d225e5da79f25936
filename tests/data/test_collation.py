import pytest
import torch
from tiny import doc

from zipper_lm import Document, Segment
from zipper_lm.data.collation import ABSENT, IGNORED, Specials, collate, tokens_of

SPECIALS = {"speech": Specials(10, 11, 12), "text": Specials(0, 1, 2)}
DOCUMENTS = [
    Document([Segment("speech", ids=[20, 21]), Segment("text", ids=[5], target=True), Segment("speech", ids=[22])]),
    doc(("text", [6, 7])),
]


def test_a_stream_by_hand() -> None:
    batch = collate(DOCUMENTS, SPECIALS)
    assert list(batch) == ["speech", "text"]
    speech, text = batch["speech"], batch["text"]
    assert speech["input_ids"].tolist() == [[10, 20, 21, 11, 10, 22, 11], [12] * 7]
    assert speech["segments"].tolist() == [[0, 0, 0, 0, 2, 2, 2], [ABSENT] * 7]
    assert speech["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0] * 7]
    assert (speech["labels"] == IGNORED).all()
    done, say_text = 2, 1
    assert speech["handover"][0].tolist() == [IGNORED] * 3 + [say_text] + [IGNORED] * 2 + [done]
    # A row that is absent attends to one padding token, so that softmax has something; it is no segment's.
    assert speech["attention_mask"].tolist() == [[1] * 7, [1, 0, 0, 0, 0, 0, 0]]
    assert text["input_ids"].tolist() == [[0, 5, 1, 2], [0, 6, 7, 1]]
    assert text["labels"].tolist() == [[IGNORED, 5, 1, IGNORED], [IGNORED] * 4]
    assert text["handover"].tolist() == [[IGNORED, IGNORED, 0, IGNORED], [IGNORED, IGNORED, IGNORED, done]]
    assert text["involved"].tolist() == speech["involved"].tolist() == [[True, True], [False, True]]
    assert all(v.dtype == torch.long for k, v in text.items() if k != "involved")


def test_sides_differ_only_in_padding() -> None:
    left, right = (collate(DOCUMENTS, SPECIALS, side=side) for side in ("left", "right"))
    for name in right:
        for key in right[name]:
            if key == "involved":
                continue
            for row in range(2):
                there = [b[name]["segments"][row] >= 0 for b in (left, right)]
                assert left[name][key][row][there[0]].tolist() == right[name][key][row][there[1]].tolist()
    assert left["text"]["input_ids"].tolist()[0] == [2, 0, 5, 1]
    assert left["speech"]["attention_mask"].tolist()[1] == [0] * 6 + [1]


def test_an_open_segment_has_no_end() -> None:
    text = collate(DOCUMENTS, SPECIALS, open_last=True, towers=["text"])["text"]
    assert text["input_ids"].tolist() == [[0, 5, 1], [0, 6, 7]]
    assert text["handover"].tolist() == [[IGNORED, IGNORED, 0], [IGNORED] * 3]


def test_a_tower_that_nothing_involves_is_left_out_unless_asked_for() -> None:
    assert list(collate(DOCUMENTS[1:], SPECIALS)) == ["text"]
    assert collate(DOCUMENTS[1:], SPECIALS, towers=["speech"])["speech"]["segments"].tolist() == [[ABSENT]]


def test_empty_documents_in_a_batch() -> None:
    assert collate([Document(), DOCUMENTS[1]], SPECIALS)["text"]["segments"].tolist() == [[ABSENT] * 4, [0] * 4]


def test_what_cannot_be_collated() -> None:
    with pytest.raises(ValueError, match="no documents"):
        collate([], SPECIALS)
    with pytest.raises(ValueError, match="unknown modality 'smell'"):
        collate([doc(("smell", [1]))], SPECIALS)
    with pytest.raises(ValueError, match="'text' has no ids"):
        tokens_of(Segment("text", "hello"), SPECIALS["text"])


def test_a_batch_goes_to_a_device_as_a_whole() -> None:
    batch = collate([doc(("text", [4, 5]), ("speech", [6]))], {"text": Specials(0, 1, 2), "speech": Specials(0, 1, 2)})
    moved = batch.to("meta", non_blocking=True)
    assert type(moved) is type(batch)
    assert moved.keys() == batch.keys()
    assert {v.device.type for side in moved.values() for v in side.values()} == {"meta"}
    assert {v.device.type for side in batch.values() for v in side.values()} == {"cpu"}
