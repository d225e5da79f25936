"""Where a tower that writes stands in its own stream."""

from types import SimpleNamespace

import torch

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
