"""What stands in front of every route: ids of requests, who may come in, and how much they may send, at what pace.

Plain ASGI: a request's body passes through unread, so one that is too large is refused before it is held.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
import uuid
from typing import Any
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

from zipper_lm.serve.errors import Refusal, answer, failure_of, unavailable
from zipper_lm.serve.limits import ROOM_FOR_FIELDS
from zipper_lm.serve.service import Service

_HARMLESS = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_OPEN = ("/", "/health")  # and what the page is made of
PAGE = "/page/"
KEY_PROTOCOL = "openai-insecure-api-key."
"""Browsers cannot send a header with a websocket: the key is a protocol's name there."""
PAGE_PROTOCOL = "zipper-api-key."
"""So the page does. A protocol's name has no ``/`` or ``=``, which a key may have: they are escaped as in a URL."""
_DROPPING = 5.0  # seconds
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class Gate:
    """Middleware.

    Args:
        app: what is behind it. service: whose limits and key.
    """

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request or websocket."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _HARMLESS.fullmatch(given) else f"req_{uuid.uuid4().hex}".encode()
        status, begun, began = 500, False, time.monotonic()

        async def named(message: Any) -> None:
            nonlocal status, begun
            begun = True
            if message["type"] in ("http.response.start", "websocket.accept", "websocket.http.response.start"):
                status = message.get("status", 101)
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            await send(message)

        try:
            self._check(scope, headers)
            await self.app(scope, self._bounded(headers, receive) if scope["type"] == "http" else receive, named)
        except Exception as error:
            refusal = error if isinstance(error, Refusal) else failure_of(error)
            if not begun:  # else what was sent stays a part, and the connection breaks off
                if refusal.status == 413 and b"expect" not in headers:
                    await _drop(receive)
                await _refuse(refusal, scope, receive, named)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.service.metrics.request(route, status, time.monotonic() - began)

    def _check(self, scope: Any, headers: dict[bytes, bytes]) -> None:
        if self.service.connections() > self.service.limits.connections:
            raise unavailable("too many connections are open", {"connection": "close"})
        host = _place(b"//" + headers.get(b"host", b""))
        if self.service.local and host.hostname not in _LOOPBACK | {self.service.host}:
            # a page elsewhere may have given its own name this address
            raise Refusal(403, f"this server is not called {str(host.hostname)[:80]!r}", code="unknown_host")
        origin = headers.get(b"origin")
        if origin is not None and (_place(origin).netloc or None) != host.netloc:
            raise Refusal(403, "pages of other origins are not served", code="other_origin")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise Refusal(415, "content-encoding must be identity: compressed bodies are not read")
        path = scope["path"]
        if self.service.key is not None and path not in _OPEN and not path.startswith(PAGE):
            offered = _offered(headers)
            if not secrets.compare_digest(offered, self.service.key.encode()):
                raise Refusal(401, "a valid key is needed: authorization: Bearer KEY", code="invalid_api_key")
        if path not in _OPEN and path != "/metrics" and not path.startswith(PAGE):
            self.service.check_open()

    def _bounded(self, headers: dict[bytes, bytes], receive: Any) -> Any:
        most, read = self.service.limits.upload + ROOM_FOR_FIELDS, 0
        until = time.monotonic() + self.service.limits.body
        claimed = headers.get(b"content-length", b"0")
        if not claimed.isdigit() or int(claimed) > most:
            raise _too_large(most)

        async def bounded() -> Any:
            nonlocal read
            if read < 0:  # the body is there: what comes now is the client's leaving
                return await receive()
            try:
                patience = min(self.service.limits.stall, until - time.monotonic())
                message = await asyncio.wait_for(receive(), patience)
            except TimeoutError:
                raise Refusal(408, "the request's body did not come", headers={"connection": "close"}) from None
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > most:
                    await _drop(receive)
                    raise _too_large(most)
                if not message.get("more_body"):
                    read = -1
            return message

        return bounded


def _place(url: bytes) -> SplitResult:
    """The parts of a URL; of one that is none, nothing."""
    try:
        return urlsplit(url.decode("latin-1"))
    except ValueError:  # such as half of an IPv6 address
        return urlsplit("")


def _offered(headers: dict[bytes, bytes]) -> bytes:
    """The key that a client names; empty if none."""
    kind, _, key = headers.get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"bearer":
        return key.strip()
    for protocol in headers.get(b"sec-websocket-protocol", b"").split(b","):
        if protocol.strip().startswith(KEY_PROTOCOL.encode()):
            return protocol.strip()[len(KEY_PROTOCOL) :]
        if protocol.strip().startswith(PAGE_PROTOCOL.encode()):
            return unquote_to_bytes(protocol.strip()[len(PAGE_PROTOCOL) :])
    return b""


def _too_large(most: int) -> Refusal:
    message = f"the request is larger than {most} bytes"
    return Refusal(413, message, code="request_too_large", headers={"connection": "close"})


async def _drop(receive: Any) -> None:
    """Take in some of what a client is still sending: it does not listen before."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DROPPING):
            while (await receive()).get("more_body"):
                pass


async def _refuse(refusal: Refusal, scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.message[:100]})
        return
    await answer(refusal)(scope, receive, send)
