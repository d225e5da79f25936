"""What one request says, in all of its segments: raw values from what clients send, within limits for all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zipper_lm.data.document import Segment
from zipper_lm.serve.errors import Refusal
from zipper_lm.serve.heard import from_base64, read_image, read_sound
from zipper_lm.serve.service import Service


class Reading:
    """The segments of one request.

    Args:
        service: see there.

    Attributes:
        segments: so far. params: the field that each came in.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.segments: list[Segment] = []
        self.params: list[str] = []
        self._seconds, self._characters, self._ids = 0.0, 0, 0

    def text(self, modality: str, text: str, param: str) -> None:
        """Add a text. Raises `Refusal` for too much of it."""
        self._characters += len(text)
        self._within(self._characters, self.service.limits.text, "characters", param)
        self._add(Segment(modality, text), param)

    async def sound(self, modality: str, data: Any, param: str) -> None:
        """Add a sound file in base64. Raises `Refusal` for what is none, or too much of it."""
        wave, rate = await self.service.apart(lambda: read_sound(from_base64(data, param), self.service.limits, param))
        self._seconds += len(wave) / rate
        self._within(self._seconds, self.service.limits.seconds, "seconds of sound", param)
        self.service.metrics.sound.labels("read").inc(len(wave) / rate)
        self._add(Segment(modality, (wave, rate)), param)

    async def picture(self, modality: str, url: str, param: str) -> None:
        """Add a picture from its data URL. Raises `Refusal` for what is none."""
        self._add(Segment(modality, await self.service.apart(read_image, url, self.service.limits, param)), param)

    def ids(self, modality: str, ids: Sequence[int], param: str) -> None:
        """Add token ids. Raises `Refusal` for too many."""
        self._ids += len(ids)
        self._within(self._ids, self.service.limits.ids, "token ids", param)
        self._add(Segment(modality, ids=list(ids)), param)

    def _add(self, segment: Segment, param: str) -> None:
        self.segments.append(segment)
        self.params.append(param)
        self._within(len(self.segments), self.service.limits.segments, "segments", param)

    @staticmethod
    def _within(number: float, most: float, what: str, param: str) -> None:
        if number > most:
            raise Refusal(400, f"the request has more than {most:g} {what}", param=param, code="invalid_value")
