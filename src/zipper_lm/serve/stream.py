"""Responses that grow: they end when the client goes away, or does not read for long."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi.responses import Response

from zipper_lm.serve.errors import refusal_of
from zipper_lm.serve.live import left


class Stream(Response):
    """A response whose pieces are sent as they come. What fails before the first is an ordinary error; later it breaks
    the connection off, so that nobody takes a part for the whole.

    Args:
        pieces: closed when the client goes away. media_type: of all. stall: seconds that one piece may take to be sent.
        headers: to be sent along.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        media_type: str,
        stall: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.pieces, self.stall, self.status_code, self.background = pieces, stall, 200, None
        self.media_type = media_type
        self.body = b""
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send everything."""
        sending, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                with contextlib.suppress(TimeoutError):  # who does not read is left
                    sending.result()
        finally:
            gone.cancel()
            sending.cancel()
            with contextlib.suppress(BaseException):
                await sending
            await self.pieces.aclose()

    async def _send(self, send: Any) -> None:
        begun = False
        async for piece in self.pieces:
            if not begun:
                begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with asyncio.timeout(self.stall):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        if not begun:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Events(Stream):
    """Server-sent events: each piece is one, as JSON. What fails after the first becomes an event, too."""

    def __init__(
        self, events: AsyncGenerator[Any, None], stall: float, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(_told(events), "text/event-stream", stall, headers)


async def _told(events: AsyncGenerator[Any, None]) -> AsyncGenerator[bytes, None]:
    begun = False
    try:
        async for event in events:
            yield event_of(event)
            begun = True
    except Exception as error:
        if not begun:
            raise
        yield event_of(refusal_of(error).body)
    finally:
        await events.aclose()


def event_of(value: Any) -> bytes:
    """One event; a text is sent as it is."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
