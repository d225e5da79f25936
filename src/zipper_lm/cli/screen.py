"""Text on the screen while a model writes it, and at the end what it has written."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from zipper_lm.data.document import Document
    from zipper_lm.generation.segment import StreamedToken

HELD_BACK = 8
"""Characters that wait for further tokens, which may change them: half a character is U+FFFD until its other half is
there (three at most), and some tokenizers close up ``do n't``."""


class Screen:
    """Text that grows: only what is new of it is written."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.shown = out, ""

    def show(self, text: str) -> None:
        """Write what `text` has more than what is there; nothing if it begins otherwise."""
        if text.startswith(self.shown):
            self.out.write(text[len(self.shown) :])
            self.out.flush()
            self.shown = text

    def end(self, text: str) -> None:
        """Let the last that is shown be `text`: all of it once more, if what is there was changed."""
        if not text.startswith(self.shown):
            self.out.write("\n")
            self.shown = ""
        self.show(text)


def follow(
    stream: Generator[StreamedToken, None, Document],
    screen: Screen,
    line: Callable[[str, list[int]], str],
    expected: Mapping[int, str],
) -> Document:
    """Show a document as it is written.

    Args:
        stream: its tokens. screen: where it is shown.
        line: what is shown of a modality and its ids; nothing of a sound or picture.
        expected: number of each segment that will be written, and its modality; an empty one has no tokens.

    Returns:
        The document.
    """
    ids: dict[int, list[int]] = {}
    lines = {number: line(modality, []) for number, modality in expected.items()}
    while True:
        try:
            token = next(stream)
        except StopIteration as end:
            return end.value
        written = ids.setdefault(token.segment, [])
        written.append(token.id)
        lines[token.segment] = line(token.modality, written)
        shown = "".join(lines[number] for number in sorted(lines) if number <= token.segment)
        screen.show(shown[: -HELD_BACK - 1])  # the last is the end of the line
