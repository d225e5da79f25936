"""One vocabulary, one stream."""

from __future__ import annotations

import pytest
import torch

from zipper_lm import Document, Segment
from zipper_lm.data.collation import IGNORED, collate
from zipper_lm.models.baseline.vocabulary import Modality, join, prompts

TEXT = Modality("text", 0, 10, 0, 1, 2)
SPEECH = Modality("speech", 12, 20, 17, 18, 19)
BOTH = [TEXT, SPEECH]
SPECIALS = {m.name: m.specials for m in BOTH}
DOCUMENTS = [
    Document([Segment("speech", ids=[3, 4]), Segment("text", ids=[5], target=True)]),
    Document([Segment("text", ids=[6, 7]), Segment("speech", ids=[8], target=True), Segment("text", ids=[9])]),
]
STREAMS = [
    [17 + 12, 3 + 12, 4 + 12, 18 + 12, 0, 5, 1],
    [0, 6, 7, 1, 17 + 12, 8 + 12, 18 + 12, 0, 9, 1],
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_segments_come_in_reading_order_whatever_the_padding(side):
    joined = join(collate(DOCUMENTS, SPECIALS, side=side), BOTH)
    for row, stream in enumerate(STREAMS):
        length = len(stream)
        assert joined.input_ids[row, :length].tolist() == stream
        assert joined.attention_mask[row].tolist() == [1] * length + [0] * (10 - length)
    assert joined.labels[0].tolist() == [IGNORED] * 5 + [5, 1] + [IGNORED] * 3
    assert joined.labels[1].tolist() == [IGNORED] * 5 + [20, 30] + [IGNORED] * 3
    assert joined.owners[0].tolist() == [1] * 4 + [0] * 3 + [-1] * 3


def test_labels_of_a_noisy_history_are_moved_too():
    segment = Segment("speech", ids=[3, 9], labels=[3, 4], target=True)
    joined = join(collate([Document([segment])], SPECIALS), BOTH)
    assert joined.input_ids.tolist() == [[29, 15, 21, 30]]
    assert joined.labels.tolist() == [[IGNORED, 15, 16, 30]]


def test_prompts_are_what_was_read_and_the_speakers_bos():
    ids, mask = prompts([DOCUMENTS[0], Document([])], "speech", BOTH)
    assert ids[0].tolist() == [*STREAMS[0], 29]
    assert ids[1, -1] == 29
    assert torch.equal(mask.sum(1), torch.tensor([8, 1]))
