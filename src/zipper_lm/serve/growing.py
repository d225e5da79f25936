"""Text that grows token by token: what is sure of it is told as it comes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

HELD_BACK = 8
"""Characters that wait where a tokenizer changes what it has said: some close up ``do n't``."""
_HALF = "\ufffd"  # a character of which not all bytes are there
_HARD = "I do n't , it 's . We 've é漢 (x)"


class Growing:
    """The text of one segment.

    Args:
        codec: of text or of sequences. held: characters that wait; see `held_back`. stops: the text ends before the
            first of these.
    """

    def __init__(self, codec: Any, held: int, stops: Sequence[str] = ()) -> None:
        self.codec, self.held, self.stops, self.told = codec, held, stops, ""
        self.ids: list[int] = []

    def add(self, token: int) -> str:
        """What one more token tells."""
        self.ids.append(token)
        text = self.text
        text = text[: max(0, len(text) - self.held)].rstrip(_HALF)
        return self._tell(text[: len(text) - max((_begun(text, stop) for stop in self.stops), default=0)])

    def end(self) -> str:
        """What was still held back."""
        return self._tell(self.text)

    @property
    def text(self) -> str:
        """All of it."""
        text = str(self.codec.decode([self.ids])[0])
        return text[: min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=len(text))]

    def _tell(self, text: str) -> str:
        if not text.startswith(self.told):
            return ""
        new = text[len(self.told) :]
        self.told += new
        return new


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def held_back(codec: Any) -> int:
    """How many characters have to wait for more tokens, by trying it: none, where these change nothing."""
    if codec.kind != "text":
        return 0
    ids = [i for word in _HARD.split() for i in _ids(codec, f" {word}")]
    texts = [codec.decode([ids[:end]])[0].rstrip(_HALF) for end in range(len(ids) + 1)]
    return 0 if all(after.startswith(before) for before, after in pairwise(texts)) else HELD_BACK


def _ids(codec: Any, text: str) -> list[int]:
    try:
        return list(codec.encode([text])[0])
    except ValueError:  # it lacks some of the characters
        return []
