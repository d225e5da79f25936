"""One response of a spoken conversation, told event by event, in OpenAI's names and order."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import WebSocketDisconnect

from zipper_lm.data.document import Document
from zipper_lm.serve.answer import Answer, Usage
from zipper_lm.serve.errors import refusal_of
from zipper_lm.serve.session import ResponseChanges, Session


class Response:
    """One answer of a conversation.

    Args:
        tell: sends one event. session: what holds for it. written: begun. changes: what it was asked with.
    """

    def __init__(
        self, tell: Callable[..., Awaitable[None]], session: Session, written: Answer, changes: ResponseChanges
    ) -> None:
        self.tell, self.session, self.written, self.changes = tell, session, written, changes
        self.id, self.item = new_id("resp"), new_id("item")
        self.spoken = session.modality == "audio"
        self.text = ""
        self._work: asyncio.Task[None] | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more comes of it."""
        return self._work is not None and self._work.done()

    def begin(self, before: str | None, remember: Callable[[Document | None], None]) -> None:
        """Tell it as it is written, from now on.

        Args:
            before: the item before it. remember: given the finished document; `None` if it failed.
        """
        self._work = asyncio.ensure_future(self._told(before, remember))

    async def cancel(self) -> None:
        """Write no more of it."""
        self.written.cancel()
        if self._work is not None and not self._work.done():
            self._work.cancel()
            await asyncio.wait([self._work])

    async def _told(self, before: str | None, remember: Callable[[Document | None], None]) -> None:
        status: str = "completed"
        details: dict[str, Any] | None = None
        try:
            await self._begin(before)
            async for piece in self.written.pieces():
                if piece.sound:
                    await self._tell("response.output_audio.delta", delta=base64.b64encode(piece.sound).decode())
                else:
                    self.text += piece.text
                    await self._tell(f"response.output_{self._words}.delta", delta=piece.text)
            if self.written.finish == "length":
                status, details = "incomplete", {"type": "incomplete", "reason": "max_output_tokens"}
            if self.written.document is not None:
                remember(self.written.document)
        except asyncio.CancelledError:
            status, details = "cancelled", {"type": "cancelled", "reason": "client_cancelled"}
        except TimeoutError:
            return
        except Exception as error:
            refusal = refusal_of(error)
            known = {k: refusal.body["error"][k] for k in ("code", "message", "type")}
            status, details = "failed", {"type": "failed", "error": known}
            remember(None)
        finally:
            self.written.cancel()
        with contextlib.suppress(RuntimeError, TimeoutError, WebSocketDisconnect):  # the client may be gone
            await self._end(status, details)

    async def _begin(self, before: str | None) -> None:
        await self.tell("response.created", response=self._state("in_progress"))
        item = self._item("in_progress", [])
        await self.tell("response.output_item.added", response_id=self.id, output_index=0, item=item)
        await self.tell("conversation.item.added", item=item, previous_item_id=before)
        await self._tell("response.content_part.added", part=self._part(""))

    async def _end(self, status: str, details: Any) -> None:
        if self.spoken:
            await self._tell("response.output_audio.done")
            await self._tell("response.output_audio_transcript.done", transcript=self.text)
        else:
            await self._tell("response.output_text.done", text=self.text)
        await self._tell("response.content_part.done", part=self._part(self.text))
        item = self._item("completed" if status == "completed" else "incomplete", [self._content()])
        await self.tell("response.output_item.done", response_id=self.id, output_index=0, item=item)
        await self.tell("conversation.item.done", item=item)
        await self.tell("response.done", response=self._state(status, details, [item], _usage(self.written.usage)))

    @property
    def _words(self) -> str:
        return "audio_transcript" if self.spoken else "text"

    async def _tell(self, kind: str, **what: Any) -> None:
        place: dict[str, Any] = {"response_id": self.id, "item_id": self.item, "output_index": 0, "content_index": 0}
        await self.tell(kind, **place, **what)

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "audio", "transcript": text} if self.spoken else {"type": "text", "text": text}

    def _content(self) -> dict[str, Any]:
        kind, words = ("output_audio", "transcript") if self.spoken else ("output_text", "text")
        return {"type": kind, words: self.text}

    def _item(self, status: str, content: list[Any]) -> dict[str, Any]:
        return {
            "id": self.item,
            "object": "realtime.item",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _state(self, status: str, details: Any = None, output: Any = (), usage: Any = None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": details,
            "output": list(output),
            "output_modalities": [self.session.modality],
            "max_output_tokens": self.session.most or "inf",
            "metadata": self.changes.metadata,
            "usage": usage,
        }


def new_id(kind: str) -> str:
    """An id that nobody guesses."""
    return f"{kind}_{uuid.uuid4().hex[:24]}"


def _usage(usage: Usage) -> dict[str, Any]:
    read, wrote = sum(usage.read.values()), sum(usage.written.values())
    return {
        "total_tokens": read + wrote,
        "input_tokens": read,
        "output_tokens": wrote,
        "input_token_details": {**_details(usage.read), "cached_tokens": 0},
        "output_token_details": _details(usage.written),
    }


def _details(counts: dict[str, int]) -> dict[str, int]:
    return {"text_tokens": counts.get("text", 0), "audio_tokens": counts.get("sound", 0)}
