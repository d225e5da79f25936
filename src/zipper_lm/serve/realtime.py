"""`WS /v1/realtime`: a spoken conversation. Who speaks says when they have done (push to talk)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from starlette.websockets import WebSocketState

from zipper_lm.data.document import Document, Segment
from zipper_lm.serve.answer import Answer
from zipper_lm.serve.errors import Refusal, answer, refusal_of
from zipper_lm.serve.fields import Fields, checked, parsed
from zipper_lm.serve.forms import RATE
from zipper_lm.serve.heard import from_base64
from zipper_lm.serve.response import Response, new_id
from zipper_lm.serve.service import Service
from zipper_lm.serve.session import ResponseChanges, Session, SessionChanges

PROTOCOL = "realtime"
_WORTH_SAYING = 512  # characters of a client's own id


def routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.websocket("/v1/realtime")
    async def talk(socket: WebSocket) -> None:
        """Talk."""
        try:
            if (model := socket.query_params.get("model")) is not None:
                service.check_model(model)
            service.check_reads(service.modality("text"), service.modality("sound"))
        except Refusal as refusal:
            await socket.send_denial_response(answer(refusal))
            return
        offered = socket.scope.get("subprotocols", [])
        await socket.accept(PROTOCOL if PROTOCOL in offered else None)
        await Conversation(service, socket).hold()

    return router


class Empty(Fields):
    """A message that says no more than its type."""

    type: str
    event_id: str | None = None


class Append(Empty):
    """Some more sound."""

    audio: str


class Update(Empty):
    """Of the session."""

    session: dict[str, Any]


class Create(Empty):
    """A response is wanted."""

    response: dict[str, Any] | None = None


class Cancel(Empty):
    """A response is not wanted any more."""

    response_id: str | None = None


class Conversation:
    """One connection.

    Args:
        service: see there. socket: accepted.
    """

    def __init__(self, service: Service, socket: WebSocket) -> None:
        self.service, self.socket = service, socket
        self.session = Session(service.name, _speaks(service), new_id("sess"))
        self.sound = bytearray()  # 16 bits at `RATE`, not committed yet
        self.said: list[Segment] = []  # committed, not answered yet
        self.turns: list[list[Segment]] = []
        self.last_item: str | None = None
        self.response: Response | None = None
        self.faults = 0
        self.known: dict[str, tuple[type[Empty], Callable[[Any], Any]]] = {
            "session.update": (Update, self._update),
            "input_audio_buffer.append": (Append, self._append),
            "input_audio_buffer.commit": (Empty, self._commit),
            "input_audio_buffer.clear": (Empty, self._clear),
            "response.create": (Create, self._create),
            "response.cancel": (Cancel, self._cancel),
        }

    async def hold(self) -> None:
        """Until somebody leaves."""
        try:
            await self.tell("session.created", session=self.session.told())
            while self.socket.application_state is WebSocketState.CONNECTED:
                if (message := await self._heard()) is None:
                    break
                await self._follow(message)
        except (WebSocketDisconnect, TimeoutError, RuntimeError):  # gone, or does not read what it is told
            pass
        finally:
            if self.response is not None:
                await self.response.cancel()
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await self.socket.close(1000)

    async def tell(self, kind: str, **what: Any) -> None:
        """Send one event."""
        async with asyncio.timeout(self.service.limits.stall):
            await self.socket.send_json({"type": kind, "event_id": new_id("event"), **what})

    async def _heard(self) -> dict[str, Any] | None:
        """The next message; `None` if none came for long, while nothing was being said."""
        while True:
            try:
                message = await asyncio.wait_for(self.socket.receive(), self.service.limits.idle)
            except TimeoutError:
                if self.response is None or self.response.done:
                    return None
                continue
            if message["type"] == "websocket.disconnect":
                return None
            return dict(message)

    async def _follow(self, message: dict[str, Any]) -> None:
        event_id = None
        try:
            if (text := message.get("text")) is None:
                raise Refusal(400, "messages must be text: JSON", code="invalid_json")
            given = parsed(text, "the message")
            if not isinstance(given, dict):
                raise Refusal(400, "the message must be an object", code="invalid_value")
            event_id = given.get("event_id") if isinstance(given.get("event_id"), str) else None
            kind = given.get("type")
            if not isinstance(kind, str) or kind not in self.known:
                raise Refusal(
                    400,
                    f"type {str(kind)[:80]!r} is not supported; there are {', '.join(self.known)}",
                    param="type",
                    code="unknown_event",
                )
            fields, follow = self.known[kind]
            await follow(checked(fields, given))
        except (WebSocketDisconnect, TimeoutError):
            raise
        except Exception as error:  # of any kind: what a client says ends nobody's conversation
            refusal = refusal_of(error)
            self.faults += 1
            await self.tell_error(refusal, event_id)
            if self.faults >= self.service.limits.faults:
                await self.socket.close(1008, "too many messages that cannot be followed")

    async def tell_error(self, refusal: Refusal, event_id: str | None = None) -> None:
        """Say what went wrong; the conversation goes on."""
        known = event_id[:_WORTH_SAYING] if event_id is not None else None
        await self.tell("error", error={**refusal.body["error"], "event_id": known})

    # --- what a client may say -----------------------------------------------------------------------------------

    async def _update(self, message: Update) -> None:
        changes = checked(SessionChanges, message.session, "session.")
        if changes.model is not None:
            self.service.check_model(changes.model)
        session = self.session.changed(changes, "session.")
        self.service.check_most(session.most, "session.max_output_tokens")
        if session.modality == "audio":
            self.service.speaker()
        self.session = session
        await self.tell("session.updated", session=self.session.told())

    async def _append(self, message: Append) -> None:
        new = from_base64(message.audio, "audio")
        if len(self.sound) + len(new) > self.service.limits.seconds * 2 * RATE:
            raise Refusal(
                400, f"more than {self.service.limits.seconds:g} s of sound", param="audio", code="input_audio_too_long"
            )
        self.sound += new

    async def _commit(self, message: Empty) -> None:
        if len(self.sound) < 2 * RATE // 10 or len(self.sound) % 2:
            raise Refusal(
                400,
                f"the buffer holds {len(self.sound)} bytes: it must hold at least 100 ms of 16-bit samples",
                code="input_audio_buffer_commit_empty",
            )
        self._check_held()
        wave = np.frombuffer(bytes(self.sound), "<i2").astype(np.float32) / 32768
        self.sound.clear()
        self.said.append(Segment(self.service.modality("sound"), (wave, RATE)))
        self.service.metrics.sound.labels("read").inc(len(wave) / RATE)
        item, before = new_id("item"), self.last_item
        self.last_item = item
        await self.tell("input_audio_buffer.committed", item_id=item, previous_item_id=before)
        content = [{"type": "input_audio", "transcript": None}]
        told = {"id": item, "object": "realtime.item", "type": "message", "status": "completed", "role": "user"}
        await self.tell("conversation.item.added", item={**told, "content": content}, previous_item_id=before)
        await self.tell("conversation.item.done", item={**told, "content": content}, previous_item_id=before)

    def _check_held(self) -> None:
        """Raise `Refusal` for more that waits for an answer than one request may say, its answer included."""
        if len(self.said) + 3 > (most := self.service.limits.segments):
            raise Refusal(400, f"more than {most} segments, with the answer's", code="input_audio_too_long")
        seconds = sum(len(s.value[0]) for s in self.said) / RATE + len(self.sound) / (2 * RATE)
        if seconds > self.service.limits.seconds:
            raise Refusal(
                400, f"more than {self.service.limits.seconds:g} s of sound wait", code="input_audio_too_long"
            )

    async def _clear(self, message: Empty) -> None:
        self.sound.clear()
        await self.tell("input_audio_buffer.cleared")

    async def _create(self, message: Create) -> None:
        if self.response is not None and not self.response.done:
            raise Refusal(400, "a response is being written", code="conversation_already_has_active_response")
        changes = checked(ResponseChanges, message.response or {}, "response.")
        session = self.session.changed(changes, "response.")
        self.service.check_most(session.most, "response.max_output_tokens")
        if not self.said:
            raise Refusal(400, "nothing was committed that could be answered", code="conversation_empty")
        name = self.service.modality("text")
        how = {name: {} if session.most is None else {"max_new_tokens": session.most}}
        written = Answer(self.service, "pcm" if session.modality == "audio" else None, how)
        earlier = [s for turn in self.turns for s in turn]
        given = [*earlier, *self.said]
        try:
            await written.begin(Document(given), ["response"] * len(given))
        except Refusal as refusal:
            if refusal.status == 400:  # it can never be read: kept, it would be in the way of whatever is said later
                self.said, self.turns = [], []
            raise
        count, self.said = len(earlier), []
        self.response = Response(self.tell, session, written, changes)
        before, self.last_item = self.last_item, self.response.item

        def remember(document: Document | None) -> None:
            if document is None:  # perhaps it failed by what was said before
                self.turns = []
            elif self.service.turns and changes.conversation != "none":
                self.turns = [*self.turns, document.segments[count:]][-self.service.turns :]

        self.response.begin(before, remember)

    async def _cancel(self, message: Cancel) -> None:
        now = self.response
        if now is None or now.done or message.response_id not in (None, now.id):
            raise Refusal(400, "no such response is being written", code="response_cancel_not_active")
        await now.cancel()


def _speaks(service: Service) -> bool:
    try:
        service.check_reads(service.speaker(), service.modality("text"))
    except Refusal:
        return False
    return True
