"""A document that an engine writes, as the caller holds it: its tokens as they come, its end, and a way to stop it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from zipper_lm.data.document import Document
from zipper_lm.generation.candidates import decode_written
from zipper_lm.generation.segment import Stop, StreamedToken


class EngineFull(RuntimeError):
    """As many documents wait or are being written as the engine was told to hold."""


class EngineClosed(RuntimeError):
    """The engine takes nothing more."""


class Handle:
    """A document that is being written.

    Iterating yields its tokens as they come (those of a segment with several samples once one was chosen), and ends
    with the document.
    """

    def __init__(
        self, given: Document, processor: Any, on_token: Callable[[StreamedToken], None] | None = None
    ) -> None:
        self.given, self.processor = Document(list(given)), processor  # the caller's own may grow meanwhile
        self.stop = Stop()
        self.failure: BaseException | None = None  # what `on_token` raised
        self._tokens: queue.SimpleQueue[StreamedToken | None] = queue.SimpleQueue()
        self._on_token = self._tokens.put if on_token is None else on_token
        self._future: Future[Document] = Future()
        self._decoding = threading.Lock()
        self._decoded = False

    def __iter__(self) -> Iterator[StreamedToken]:
        while (token := self._tokens.get()) is not None:
            yield token
        self._tokens.put(None)  # for who iterates again

    def cancel(self) -> None:
        """Nobody wants to hear more: its rows are free at the next step. Nothing happens if it is done."""
        self.stop.now = True

    def done(self) -> bool:
        """Whether it is finished, cancelled or failed."""
        return self._future.done()

    def add_done_callback(self, callback: Any) -> None:
        """Call ``callback(handle)`` when it is done, in the engine's thread, or at once if it is."""
        self._future.add_done_callback(lambda _: callback(self))

    def result(self, timeout: float | None = None, *, decode: bool = True) -> Document:
        """The finished document.

        Args:
            timeout: in seconds. decode: whether written ids are decoded to raw values, where there are codecs.

        Raises:
            CancelledError: if it was cancelled. TimeoutError: if it takes longer. ValueError: for what cannot be
                written. RuntimeError: if the engine failed, or weights changed while it was written.
        """
        document = self._future.result(timeout)
        if decode:
            with self._decoding:
                if not self._decoded:
                    decode_written(self.processor, [self.given], [document])
                    self._decoded = True
        return document

    # --- the engine's side ---------------------------------------------------------------------------------------

    def tell(self, token: StreamedToken) -> None:
        """One token has come. Whoever fails when told of it fails alone."""
        if self.stop.now:
            return
        try:
            self._on_token(token)
        except BaseException as error:  # the caller's code, in a thread that is not the caller's
            self.failure, self.stop.now = error, True

    def finish(self, document: Document | None, error: BaseException | None) -> None:
        """It is done."""
        if self._future.done():
            return
        if error is not None:
            self._future.set_exception(error)
        else:
            assert document is not None
            self._future.set_result(document)
        self._tokens.put(None)
