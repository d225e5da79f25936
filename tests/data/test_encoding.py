"""Rows through their codecs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.encoding import CHUNK, Broken, Joined, column_with, encode_rows
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


def test_texts_are_told_of_the_first_rows_those_that_cannot_be_read_counted() -> None:
    """As `data.limit` counts them: else the text of a row beyond the limit was told for each that could not be read."""

    class Some(Sequence[Any]):
        """The first of them cannot be read."""

        def __len__(self) -> int:
            return 4

        def __getitem__(self, number: Any) -> Any:
            if number == 0:
                raise ValueError("torn")
            return {"sign": f"s{number}", "text": f"t{number}"}

    broken = Broken(1)
    signs, texts = column_with(Some(), "sign", "text", broken, 2)
    assert (signs, texts) == (["s1", "s2", "s3"], ["t1", None, None])
    assert len(broken.items) == 1
    stream = ({"sign": f"s{number}", "text": f"t{number}"} for number in range(3))
    assert column_with(stream, "sign", "text", None, 2)[1] == ["t0", "t1", None]
