"""An answer: a text and perhaps its sound, piece by piece, to a document or to a chat with the text tower alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zipper_lm.data.document import Document, Segment
from zipper_lm.generation.settings import MAX_NEW_TOKENS
from zipper_lm.serve.live import Live
from zipper_lm.serve.service import Service
from zipper_lm.serve.voice import Voice


@dataclass(frozen=True)
class Piece:
    """Some more of an answer: text, or sound in its form."""

    text: str = ""
    sound: bytes = b""


@dataclass
class Usage:
    """Tokens, by kind of modality.

    Attributes:
        read, written: by ``"text"``, ``"sound"``, ``"picture"`` or ``"sequence"``.
    """

    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)


class Answer:
    """Made by `begin`; its pieces are read once.

    Args:
        service: see there. form: of the sound; `None`: text alone is written. changes: of settings, by modality. stops:
            strings that end the text.

    Attributes:
        text: what has been written. finish: ``"stop"``, or ``"length"`` where as much was written as was allowed.
        usage: what was read and written. document: all of it, once it is finished; `None` of a chat with the text tower
            alone.
    """

    def __init__(
        self, service: Service, form: str | None, changes: Mapping[str, Mapping[str, Any]], stops: Sequence[str] = ()
    ) -> None:
        self.service, self.form, self.changes, self.stops = service, form, changes, stops
        self.name = service.modality("text")
        self.sound = None if form is None else service.speaker()
        if self.sound is not None:
            service.check_reads(self.sound, self.name)
        self.text, self.finish, self.usage = "", "stop", Usage()
        self.document: Document | None = None
        self.ends: set[int] = set()
        self.live: Live | None = None
        self.alone = False

    async def begin(self, given: Document | Sequence[int], params: Sequence[str]) -> Answer:
        """Have it written.

        Args:
            given: a document, or what the text tower goes on from by itself. params: the field that each segment came
                in, or all of the ids.

        Raises:
            Refusal: if it cannot be.
        """
        how = {name: dict(own) for name, own in self.changes.items()}
        if self.stops:
            how[self.name] = {**how.get(self.name, {}), "stop_strings": list(self.stops)}
        if isinstance(given, Document):
            schedule = [self.name] if self.sound is None else [self.name, self.sound]
            self.live = await self.service.write(given, schedule, how, params=params)
            return self
        self.alone = True
        self.ends = _ends(self.service.model.tower(self.name).backbone)
        self.usage.read["text"] = len(given)
        self.live = await self.service.write_alone(self.name, given, how.get(self.name, {}), params[0])
        return self

    def cancel(self) -> None:
        """Nobody wants to hear more."""
        if self.live is not None:
            self.live.cancel()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Everything, as it comes. Raises `Refusal` for what the engine met."""
        growing, voice = self.service.growing(self.name, self.stops), None
        assert self.live is not None
        try:
            async for token in self.live:
                if token.modality == self.name:
                    if token.id in self.ends:
                        self.live.cancel(gone=False)
                        break
                    if new := growing.add(token.id):
                        yield Piece(text=new)
                    continue
                if voice is None:
                    voice = self._voice()
                    if new := growing.end():
                        yield Piece(text=new)
                if piece := await voice.add(token.id):
                    yield Piece(sound=piece)
            else:
                self._count(await self.live.document())
            if new := growing.end():
                yield Piece(text=new)
            self.text = growing.text
            self._finish(len(growing.ids))
            if self.sound is not None and self.alone:
                async for spoken in self._say():
                    yield spoken
            elif self.sound is not None and (piece := await (voice or self._voice()).end()):
                yield Piece(sound=piece)
        finally:
            self.cancel()

    async def _say(self) -> AsyncGenerator[Piece, None]:
        """A text that a tower wrote by itself, spoken."""
        voice, sound = self._voice(), self.sound
        assert sound is not None
        if self.text.strip():
            how = {sound: self.changes.get(sound, {})}
            document = Document([Segment(self.name, self.text)])
            self.live = await self.service.write(document, [sound], how, params=["messages"])
            async for token in self.live:
                if piece := await voice.add(token.id):
                    yield Piece(sound=piece)
            self.usage.written["sound"] = len((await self.live.document())[-1].ids or [])
        if piece := await voice.end():
            yield Piece(sound=piece)

    def _voice(self) -> Voice:
        assert self.sound is not None
        assert self.form is not None
        return Voice(self.service, self.sound, self.form)

    def _count(self, document: Document) -> None:
        if self.alone:
            return
        self.document = document
        new = 1 if self.sound is None else 2
        for counts, segments in (
            (self.usage.read, document.segments[:-new]),
            (self.usage.written, document.segments[-new:]),
        ):
            for segment in segments:
                kind = self.service.kind(segment.modality) or "ids"
                counts[kind] = counts.get(kind, 0) + len(segment.ids or [])

    def _finish(self, tokens: int) -> None:
        self.usage.written.setdefault("text", tokens)
        most = self.service.settings(self.changes).get(self.name, {}).get("max_new_tokens", MAX_NEW_TOKENS)
        stopped = any(stop in self.text for stop in self.stops)
        self.finish = "length" if tokens >= most and not stopped else "stop"


def _ends(backbone: Any) -> set[int]:
    """Ids that end what a backbone writes by itself: chats often have an end of their own."""
    ends = getattr(backbone.generation_config, "eos_token_id", None)
    return set(ends) if isinstance(ends, list) else set() if ends is None else {int(ends)}
