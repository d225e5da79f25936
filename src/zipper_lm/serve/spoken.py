"""Sound of tokens while these are still being written, without seams.

A codec decodes a row of tokens in one go, and what a token sounds like depends on its neighbours. So tokens are decoded
in windows that overlap: each begins with tokens whose sound was told already, and ends with some whose sound is not
told yet. Where two windows meet, the later one is shifted by up to half a pitch period to where it fits the earlier one
best, and fades in while that fades out: codecs that find their phases anew for each window differ in nothing else.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from zipper_lm.codecs.audio import SAMPLING_RATE

FIRST = 25
"""Tokens after which something is heard, at most."""
_BEGIN, _PART = 0.6, 1.0  # seconds that are told at once: at first, and later
_BEFORE, _AHEAD = 0.5, 0.2  # seconds that are decoded again, and that are not told yet
_FADE = SAMPLING_RATE // 50
_SHIFT = SAMPLING_RATE // 100


class Spoken:
    """The sound of one segment.

    Args:
        codec: of sound.
    """

    def __init__(self, codec: Any) -> None:
        self.codec = codec
        rate = codec.rate
        self.whole = int(getattr(codec, "codebooks", 1))  # tokens of a frame, which is decoded or dropped as one
        self.part = max(1, round(_PART * rate))
        self.first = max(1, min(FIRST, round(_BEGIN * rate)))
        self.before, self.ahead = round(_BEFORE * rate), max(1, min(round(_AHEAD * rate), self.first // 3))
        self.ids: list[int] = []
        self.told = 0  # tokens whose sound is out
        self.tail = np.zeros(0, dtype=np.float32)  # what the last window says of the sound after these

    def add(self, token: int) -> bool:
        """One more token has come; returns whether it is time to take what there is."""
        self.ids.append(token)
        return len(self.ids) - self.told >= (self.part + self.ahead if self.told else self.first)

    def take(self) -> np.ndarray:
        """Sound, float32 [time] at 16 kHz, of what is sure."""
        return self._tell(len(self.ids) - self.ahead)

    def end(self) -> np.ndarray:
        """The rest."""
        return self._tell(len(self.ids))

    def _tell(self, until: int) -> np.ndarray:
        until -= until % self.whole if until < len(self.ids) else 0
        if until <= self.told:
            return self._fade_out() if until == len(self.ids) else self.tail[:0]
        begin = max(0, self.told - self.before)
        begin -= begin % self.whole
        window = self._decoded(begin, len(self.ids))
        start, end = (self._place(window, begin, at) for at in (self.told, until))
        start = min(start, end)
        if len(self.tail):
            start += self._shift(window, start)
            count = min(len(self.tail), len(window) - start)
            up = np.linspace(0, 1, count, dtype=np.float32)
            window[start : start + count] = (1 - up) * self.tail[:count] + up * window[start : start + count]
        self.told = until
        self.tail = window[end : end + _FADE]
        return window[start:end]

    def _fade_out(self) -> np.ndarray:
        """The last window had more to say, but it ends here."""
        tail, self.tail = self.tail, self.tail[:0]
        return tail * np.linspace(1, 0, len(tail), dtype=np.float32)

    def _decoded(self, begin: int, end: int) -> np.ndarray:
        return np.array(self.codec.decode([self.ids[begin:end]])[0], dtype=np.float32)

    def _place(self, window: np.ndarray, begin: int, token: int) -> int:
        """The sample of a window, whose first token is `begin`, at which a token's sound begins."""
        each = SAMPLING_RATE / self.codec.rate
        if token == len(self.ids):
            return len(window)
        if abs(len(window) - each * (len(self.ids) - begin)) < max(1.0, each * self.whole / 2):
            return min(len(window), round(each * (token - begin)))
        # tokens last differently long, or some were dropped: what comes before says how long it is
        return min(len(window), len(self._decoded(begin, token)) if token > begin else 0)

    def _shift(self, window: np.ndarray, start: int) -> int:
        """How far from `start` a window goes on best from the one before."""
        count, low = len(self.tail), max(0, start - _SHIFT)
        around = window[low : start + _SHIFT + count]
        if len(around) < count or not np.any(self.tail):
            return 0
        product = np.correlate(around, self.tail, "valid")
        energy = np.convolve(around**2, np.ones(count, dtype=np.float32), "valid")
        fits = product / np.sqrt(np.maximum(energy, 1e-9))
        return low + int(fits.argmax()) - start


def seconds_of(codec: Any, tokens: int) -> float:
    """How long so many tokens last, where all last as long."""
    return math.ceil(tokens) / float(codec.rate)
