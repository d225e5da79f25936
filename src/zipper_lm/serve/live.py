"""A document that is being written, as asyncio sees it. The engine's thread calls; no thread waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from fastapi import Request

from zipper_lm.data.document import Document
from zipper_lm.generation.segment import StreamedToken
from zipper_lm.serve.errors import Refusal, refusal_of
from zipper_lm.serve.metrics import Metrics

T = TypeVar("T")


class Live:
    """Made in the loop that will read it.

    Args:
        leave: called once, in the loop, when the engine has done with it. metrics: that count its tokens.

    Attributes:
        counts: tokens that have come, by modality.
    """

    def __init__(self, leave: Callable[[], None], metrics: Metrics) -> None:
        self.loop, self.leave, self.metrics = asyncio.get_running_loop(), leave, metrics
        self.counts: dict[str, int] = {}
        self._began = time.monotonic()
        self._tokens: asyncio.Queue[StreamedToken | None] = asyncio.Queue()
        self._done = asyncio.Event()
        self._handle: Any = None
        self._cancelled = False

    def tell(self, token: StreamedToken) -> None:
        """One token has come. In the engine's thread."""
        self._call(self._take, token)

    def follow(self, handle: Any) -> None:
        """What writes it."""
        self._handle = handle
        handle.add_done_callback(lambda _: self._call(self._end))

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever would have listened
            self.loop.call_soon_threadsafe(function, *args)

    def _take(self, token: StreamedToken) -> None:
        if not self.counts:
            self.metrics.first.observe(time.monotonic() - self._began)
        self.counts[token.modality] = self.counts.get(token.modality, 0) + 1
        self.metrics.tokens.labels(token.modality).inc()
        self._tokens.put_nowait(token)

    def _end(self) -> None:
        self.leave()
        self._tokens.put_nowait(None)
        self._done.set()

    def cancel(self, gone: bool = True) -> None:
        """Nobody wants to hear more; the engine frees its rows at the next step. `gone`: whether that is because the
        client is."""
        if self._handle is not None and not self.done and not self._cancelled:
            self._cancelled = True
            self._handle.cancel()
            if gone:
                self.metrics.cancelled.inc()

    @property
    def done(self) -> bool:
        """Whether the engine has done with it."""
        return self._done.is_set()

    async def __aiter__(self) -> AsyncIterator[StreamedToken]:
        while (token := await self._tokens.get()) is not None:
            yield token

    async def document(self) -> Document:
        """The finished document; what was written has ids alone. Raises `Refusal` for what the engine met."""
        await self._done.wait()
        try:
            document: Document = self._handle.result(0, decode=False)
        except (Exception, CancelledError) as error:
            raise refusal_of(error) from error
        return document


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What some work comes to. If the client goes away, the work is cancelled.

    Args:
        request: whose body has been read. work: cancels what it had begun when it is cancelled.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(left(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await working
            raise Refusal(499, "the client went away")
        return working.result()
    finally:
        gone.cancel()
        working.cancel()


async def left(receive: Callable[[], Any]) -> None:
    """Wait until a client, whose request has been read, goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
