"""The sound of a segment that is being written, in the form that its client asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from zipper_lm.codecs.audio import SAMPLING_RATE
from zipper_lm.serve.forms import Encoder
from zipper_lm.serve.service import Service
from zipper_lm.serve.spoken import Spoken


class Voice:
    """One segment.

    Args:
        service: whose threads decode. modality: of sound. form: of `zipper_lm.serve.forms.MEDIA`.
    """

    def __init__(self, service: Service, modality: str, form: str) -> None:
        self.service, self.spoken, self.encoder = service, Spoken(service.codec(modality)), Encoder(form)

    async def add(self, token: int) -> bytes:
        """What one more token lets be heard; nothing, most times."""
        return await self._encoded(self.spoken.take) if self.spoken.add(token) else b""

    async def end(self) -> bytes:
        """The rest."""
        return await self._encoded(self.spoken.end, last=True)

    async def _encoded(self, take: Callable[[], np.ndarray], last: bool = False) -> bytes:
        def work() -> tuple[bytes, int]:
            wave = take()
            return self.encoder.add(wave) + (self.encoder.end() if last else b""), len(wave)

        piece, samples = await self.service.apart(work)
        self.service.metrics.sound.labels("written").inc(samples / SAMPLING_RATE)
        return piece
