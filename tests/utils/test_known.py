"""A tensor on meta holds nothing: whoever asks it fails, as on a GPU they would wait."""

import pytest
import torch
import torch.nn.functional as F
from transformers.masking_utils import _ignore_causal_mask_sdpa, find_packed_sequence_indices

from zipper_lm.utils.host import on_host, send
from zipper_lm.utils.known import answering, plain


def sent(values: list[list[int]]) -> torch.Tensor:
    return send([torch.tensor(values)], "meta")[0]


@pytest.mark.parametrize(("mask", "whole"), [([[1, 1], [1, 1]], True), ([[1, 1], [1, 0]], False)])
def test_a_mask_says_whether_it_has_padding(mask: list[list[int]], whole: bool) -> None:
    known = answering(sent(mask)).to(device="meta", dtype=torch.bool)
    assert _ignore_causal_mask_sdpa(known, 2, 2, 0, 0) is whole
    assert bool(known.all()) is whole
    assert bool(F.pad(known, (0, 1)).all()) is False
    with pytest.raises(RuntimeError, match="meta"):
        bool(plain(known).all())


def test_positions_say_whether_documents_share_rows() -> None:
    shared = find_packed_sequence_indices(answering(sent([[0, 1, 0, 1, 2]])))
    assert shared is not None
    assert shared.device.type == "meta"
    assert find_packed_sequence_indices(answering(sent([[0, 1, 2, 3, 4]]))) is None
    ids = answering(sent([[2, 5]]))
    assert (2 in ids[:, [-1, 0]], 3 in ids[:, [-1, 0]]) == (True, False)


def test_what_is_computed_is_computed_where_the_tensor_is() -> None:
    known, other = answering(sent([[1, 0]])), torch.ones(1, 2, device="meta")
    for made in (known * 2, known.cumsum(-1), known + other, F.embedding(known, torch.ones(2, 3, device="meta"))):
        assert made.device.type == "meta"
    assert type(known * 2) is type(known + other) is torch.Tensor  # not followed
    assert known.shape == (1, 2)
    assert known.device.type == "meta"
    assert known.is_meta


def test_what_was_written_into_answers_no_more() -> None:
    known = answering(sent([[1, 1]]))
    known[:, 0] = 0
    with pytest.raises(RuntimeError, match="meta"):
        bool(known.all())
    with pytest.raises(NotImplementedError, match="meta"):
        on_host(plain(known))


def test_where_nothing_is_waited_for_nothing_changes() -> None:
    here = torch.ones(1, 2)
    assert answering(here) is here
    unknown = torch.ones(1, 2, device="meta")
    assert answering(unknown) is unknown
    assert plain(here) is here
