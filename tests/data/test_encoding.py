"""Rows through their codecs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.encoding import CHUNK, Joined, encode_rows
from zipper_lm.data.processor import ZipperProcessor


def test_rows_stay_unread_until_they_are_encoded() -> None:
    """All rows of a data set were held at once, with the bytes of every sound, until the last was encoded."""
    alive: list[int] = []

    class Sound(str):
        def __del__(self) -> None:
            alive.remove(id(self))

    class Rows:
        """As many sounds as are asked for."""

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for _ in range(5 * CHUNK):
                sound = Sound("one")
                alive.append(id(sound))
                most.append(len(alive))
                yield {"text": "one", "label": sound}

    most: list[int] = []
    codec = TextCodec.train(["one"])
    encoded = encode_rows(ZipperProcessor({"text": codec}), Rows(), ["text"])
    assert len(encoded) == 5 * CHUNK
    assert max(most) <= 2 * CHUNK


def test_joined_rows() -> None:
    joined = Joined(["a", "b"], [], ["c"])
    assert [*joined] == ["a", "b", "c"]
    assert (joined[-1], joined[1:], len(joined)) == ("c", ["b", "c"], 3)
    with pytest.raises(IndexError):
        joined[3]
