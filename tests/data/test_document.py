from typing import Any

import numpy as np
import pytest
import torch

from zipper_lm import Document, Segment
from zipper_lm.data.document import check_modalities


def test_pairs_and_segments() -> None:
    document = Document([("speech", "a.wav"), Segment("text", ids=[1, 2], target=True), ("speech", [0.0])])
    assert document.modalities == ["speech", "text", "speech"]
    assert (len(document), document[1].target, document[0].value) == (3, True, "a.wav")
    assert document.last("speech").value == [0.0]
    assert [s.modality for s in document] == document.modalities


@pytest.mark.parametrize("arguments", [{"modality": "", "ids": [1]}, {"modality": 3, "ids": [1]}, {"modality": "text"}])
def test_unusable_segments(arguments: dict) -> None:
    with pytest.raises(ValueError, match="segment"):
        Segment(**arguments)


@pytest.mark.parametrize("ids", [[1.5], ["5"], "12", [None], [[1, 2]], 7])
def test_ids_that_are_no_ids(ids: Any) -> None:
    """1.5 was read as 1, and a text of digits as the ids that they spell."""
    with pytest.raises(ValueError, match="ids must be whole numbers"):
        Segment("text", ids=ids)


@pytest.mark.parametrize("ids", [(3, 4), np.array([3, 4]), torch.tensor([3, 4]), [3.0, 4.0]])
def test_ids_of_other_kinds(ids: Any) -> None:
    assert Segment("text", ids=ids).ids == [3, 4]


def test_nothing_of_a_modality() -> None:
    with pytest.raises(ValueError, match="no segment of modality 'text'"):
        Document([("speech", "a.wav")]).last("text")


def test_empty_ids_are_a_segment() -> None:
    assert Segment("text", ids=[]).ids == []


def test_unknown_modality_is_named() -> None:
    with pytest.raises(ValueError, match=r"document 1: unknown modality 'smell'; this model has \['speech', 'text'\]"):
        check_modalities([Document(), Document([("smell", 1)])], ["text", "speech"])
