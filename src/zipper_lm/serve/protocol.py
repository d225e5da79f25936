"""HTTP as Uvicorn speaks it, but for two things: who does not send the head of a request is left, too, and what is no
HTTP is answered as everything else is."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from zipper_lm.serve.errors import Refusal, answer


class Protocol(H11Protocol):
    """One connection.

    Attributes:
        stall: seconds that a request's head may take to come, its first byte included; each server has its own class.
    """

    stall = 30.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Somebody is there; a request must follow."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Some of a request. Uvicorn's own timer is for a connection that has been silent since its last request."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is there."""
        self._rest()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """The head was that of a websocket, which is another protocol's."""
        self._rest()
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        response = answer(Refusal(400, msg, code="invalid_http"))
        more = [(b"x-request-id", f"req_{uuid.uuid4().hex}".encode()), (b"connection", b"close")]
        head = h11.Response(status_code=400, reason=b"Bad Request", headers=[*response.raw_headers, *more])
        for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """A head that is half there is waited for; a whole one is not."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._rest()
        elif self._late is None:
            self._late = self.loop.call_later(self.stall, self.timeout_keep_alive_handler)

    def _rest(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def protocol_of(stall: float) -> type[Protocol]:
    """The protocol of a server whose clients have so many seconds for a request's head."""
    return type("Protocol", (Protocol,), {"stall": stall})
