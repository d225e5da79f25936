"""A tensor on meta holds nothing: whoever looks into it fails, as on a GPU they would wait."""

import gc

import pytest
import torch

from zipper_lm.data.collation import Batch, batch_on_host
from zipper_lm.utils import host
from zipper_lm.utils.host import on_host, send


def test_what_was_sent_need_not_be_fetched() -> None:
    originals = [torch.arange(6).view(2, 3), torch.tensor([True, False])]
    sent = send(originals, "meta")
    assert all(one.device.type == "meta" for one in sent)
    for original, one in zip(originals, sent):
        assert on_host(one) is original
        assert on_host(original) is original
        assert send([one], "meta")[0] is one
    with pytest.raises(NotImplementedError, match="meta"):
        on_host(torch.zeros(2, device="meta"))


@pytest.mark.parametrize("side", [0, 1])
def test_what_was_written_into_is_fetched_anew(side: int) -> None:
    """An original that somebody wrote into since would answer for what the device does not hold, and the other way
    round."""
    original = torch.arange(3)
    (sent,) = send([original], "meta")
    (original, sent)[side].add_(1)
    with pytest.raises(NotImplementedError, match="meta"):
        on_host(sent)


def test_originals_live_no_longer_than_what_was_made_of_them() -> None:
    before = len(host._originals)
    sent = send([torch.arange(3)], "meta")
    assert len(host._originals) == before + 1
    del sent
    gc.collect()
    assert len(host._originals) == before


def test_a_batch_is_known_where_it_is_sent() -> None:
    batch = Batch({"text": {"input_ids": torch.ones(2, 3, dtype=torch.int64), "involved": torch.ones(2, 1).bool()}})
    known = batch_on_host(batch.to("meta"))
    assert known["text"].keys() == batch["text"].keys()
    assert all(known["text"][key] is tensor for key, tensor in batch["text"].items())


def test_parts_of_one_copy_are_what_was_sent() -> None:
    """`_staged` makes them, on a GPU; `pin_memory` needs one."""
    tensors = [torch.arange(6).view(2, 3), torch.tensor([True, False]), torch.zeros(0, 4, dtype=torch.int64)]
    tensors.append(torch.arange(8).view(2, 4)[:, ::2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        sent = host._staged(tensors, "cpu")
    assert all(torch.equal(one, tensor) and one.dtype == tensor.dtype for one, tensor in zip(sent, tensors))
