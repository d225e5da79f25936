"""Letters that CTC spells: the bytes of a text's small letters (UTF-8). So there is nothing to fit, and no language is
left out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

BLANK = 0
CLASSES = 257
"""Blank, and the bytes."""


def letters_of(text: str) -> list[int]:
    """The bytes of the text's small letters, counted from 1."""
    return [1 + letter for letter in text.lower().encode()]


def text_of(letters: Sequence[int]) -> str:
    """The text of such bytes; what is no letter of any script becomes the sign for that, U+FFFD."""
    return bytes(letter - 1 for letter in letters).decode(errors="replace")


def fits(letters: Sequence[int], places: int) -> bool:
    """Whether there is a place for each letter, and one between two that are the same."""
    return len(letters) + sum(one == other for one, other in pairwise(letters)) <= places
