"""`POST /v1/documents`: any document, any schedule, all modalities, best of n, streamed by segment and token.

Ours, not OpenAI's: what a Zipper is.
"""

from __future__ import annotations

import base64
import io
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StrictInt

from zipper_lm.codecs.codec import can_decode
from zipper_lm.data.document import Document, Segment
from zipper_lm.generation.arguments import checked_settings
from zipper_lm.generation.engine.wishes import IN_THE_STEP
from zipper_lm.generation.settings import without_effect
from zipper_lm.serve.errors import Refusal
from zipper_lm.serve.fields import Fields, check_stops, checked, json_fields
from zipper_lm.serve.forms import encoded
from zipper_lm.serve.growing import Growing
from zipper_lm.serve.live import Live, unless_gone
from zipper_lm.serve.reading import Reading
from zipper_lm.serve.service import Service
from zipper_lm.serve.stream import Events
from zipper_lm.serve.voice import Voice

AUTO = "auto"
_FOLLOWED = IN_THE_STEP - {"disable_compile", "max_length", "min_length"}
"""Settings that a captured step follows; others could take a server's whole memory."""


class DocumentFields(Fields):
    """The request's body."""

    model: str
    document: list[Any]
    schedule: str | list[Any]
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    max_segments: StrictInt = Field(8, ge=1)
    best_of: StrictInt = Field(1, ge=1)
    audio_format: Literal["mp3", "opus", "flac", "wav", "pcm"] = "wav"
    stream: bool = False


class SegmentFields(Fields):
    """A segment that is given: one of what may stand for its value."""

    values: ClassVar[tuple[str, ...]] = ("text", "audio", "image", "ids")

    modality: str
    text: str | None = None
    audio: str | None = None
    image: str | None = None
    ids: list[StrictInt] | None = None


def routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/documents")
    async def write(request: Request) -> Response:
        """Have the next segments of a document written."""
        fields = await json_fields(request, DocumentFields)
        return await unless_gone(request, _answer(service, fields))

    return router


async def _answer(service: Service, fields: DocumentFields) -> Response:
    service.check_model(fields.model)
    reading = Reading(service)
    for number, given in enumerate(fields.document):
        await _read(reading, given, f"document.{number}")
    document = Document(reading.segments)
    schedule = await _schedule(reading, fields)
    changes = _changes(service, fields)
    how = {"max_segments": min(fields.max_segments, service.limits.segments - len(document))}
    live = await service.write(document, schedule, changes, params=reading.params, param="document", **how)
    written = _Written(service, fields, len(document))
    if fields.stream:
        return Events(written.events(live), service.limits.stall)
    try:
        finished = await live.document()
    finally:
        live.cancel()
    return JSONResponse(await service.apart(written.told, finished))


async def _read(reading: Reading, given: Any, param: str) -> None:
    """Add one segment. Raises `Refusal` for a form that its modality does not have."""
    service, fields = reading.service, checked(SegmentFields, given, f"{param}.")
    name = fields.modality
    if name not in service.model.names:
        raise Refusal(
            404,
            f"{param}: no modality {name[:80]!r}; {service.name} has {service.model.names}",
            param=f"{param}.modality",
            code="modality_not_found",
        )
    said = [value for value in SegmentFields.values if getattr(fields, value) is not None]
    form = {"text": "text", "sequence": "text", "sound": "audio", "picture": "image"}.get(service.kind(name) or "")
    if len(said) != 1 or said[0] not in (form, "ids"):
        forms = "ids" if form is None else f"{form} or ids"
        raise Refusal(400, f"{param}: {name} is given as {forms}", param=param, code="invalid_value")
    if fields.ids is not None:
        reading.ids(name, fields.ids, f"{param}.ids")
    elif fields.text is not None:
        reading.text(name, fields.text, f"{param}.text")
    elif fields.audio is not None:
        await reading.sound(name, fields.audio, f"{param}.audio")
    elif fields.image is not None:
        await reading.picture(name, fields.image, f"{param}.image")


async def _schedule(reading: Reading, fields: DocumentFields) -> Any:
    """A schedule as the engine takes it: names, and segments that are given in between, which are read, too."""
    service = reading.service
    if fields.schedule == AUTO:
        if len(fields.document) >= service.limits.segments:
            raise _too_many(service, "document")
        return AUTO
    entries: list[str | Segment] = []
    for number, entry in enumerate([fields.schedule] if isinstance(fields.schedule, str) else fields.schedule):
        if isinstance(entry, str):
            entries.append(entry)
            continue
        await _read(reading, entry, f"schedule.{number}")
        entries.append(reading.segments[-1])
    if len(entries) + len(fields.document) > service.limits.segments:
        raise _too_many(service, "schedule")
    if not any(isinstance(entry, str) for entry in entries):
        raise Refusal(400, "schedule names no modality to be written", param="schedule", code="invalid_value")
    if unknown := [e for e in entries if isinstance(e, str) and e not in service.model.names]:
        raise Refusal(
            404,
            f"schedule names {unknown[0][:80]!r}; {service.name} has {service.model.names}",
            param="schedule",
            code="modality_not_found",
        )
    return entries


def _too_many(service: Service, param: str) -> Refusal:
    message = f"more than {service.limits.segments} segments, given and written"
    return Refusal(400, message, param=param, code="invalid_value")


def _changes(service: Service, fields: DocumentFields) -> dict[str, dict[str, Any]]:
    """Of settings. Raises `Refusal` for those that are not followed, and for values that no segment can have."""
    changes = {name: dict(own) for name, own in fields.settings.items()}
    for name, own in changes.items():
        if name not in service.model.names:
            raise Refusal(
                400, f"settings name {name[:80]!r}; {service.name} has {service.model.names}", param="settings"
            )
        if unknown := sorted(set(own) - _FOLLOWED):
            raise Refusal(
                400,
                f"settings.{name}.{unknown[0][:80]} is not followed here; these are: {', '.join(sorted(_FOLLOWED))}",
                param=f"settings.{name}.{unknown[0][:80]}",
                code="unsupported_parameter",
            )
        _check_sizes(service, own, f"settings.{name}")
    if fields.best_of > 1:
        more = {"do_sample": True, "num_return_sequences": fields.best_of}
        if other := [(n, k) for n, own in changes.items() for k in more if own.get(k, more[k]) != more[k]]:
            raise _without(f"settings.{other[0][0]}.{other[0][1]}", f"does not go with best_of={fields.best_of}")
        changes = {name: {**changes.get(name, {}), **more} for name in service.model.names}
    try:
        chosen = checked_settings(service.model, service.settings(changes))
    except ValueError as error:
        raise Refusal(400, str(error), param="settings", code="invalid_value") from error
    for name, config in chosen.items():
        for key, needed in without_effect(config):
            if key in fields.settings.get(name, {}):
                raise _without(f"settings.{name}.{key}", f"has no effect without {needed}")
    return changes


def _without(param: str, why: str) -> Refusal:
    return Refusal(400, f"{param} {why}", param=param, code="invalid_value")


def _check_sizes(service: Service, own: dict[str, Any], param: str) -> None:
    """Raise `Refusal` for lists that would hold up every token of everybody."""
    strings = own.get("stop_strings")
    if strings is not None:
        check_stops([strings] if isinstance(strings, str) else strings, f"{param}.stop_strings")
    ids = own.get("suppress_tokens")
    if isinstance(ids, list) and len(ids) > service.limits.ids:
        param = f"{param}.suppress_tokens"
        raise Refusal(400, f"{param} has more than {service.limits.ids} ids", param=param, code="invalid_value")


class _Written:
    """What is told of one document.

    Args:
        service: see there. fields: of the request. given: how many segments were.
    """

    def __init__(self, service: Service, fields: DocumentFields, given: int) -> None:
        self.service, self.form, self.given = service, fields.audio_format, given
        self.id, self.created = f"doc_{uuid.uuid4().hex}", int(time.time())
        self.between: set[int] = set()
        if isinstance(fields.schedule, list):
            self.between = {given + n for n, entry in enumerate(fields.schedule) if not isinstance(entry, str)}

    def told(self, document: Document) -> dict[str, Any]:
        """The finished document."""
        segments = [self._segment(n, s, value=True) for n, s in enumerate(document)]
        return {"id": self.id, "object": "document", "created": self.created, **self._facts(document, segments)}

    def _facts(self, document: Document, segments: list[Any]) -> dict[str, Any]:
        counts = [(self._written(n), len(s.ids or [])) for n, s in enumerate(document)]
        read, wrote = (sum(count for new, count in counts if new == which) for which in (False, True))
        usage = {"input_tokens": read, "output_tokens": wrote, "total_tokens": read + wrote}
        return {"model": self.service.name, "segments": segments, "usage": usage}

    def _written(self, number: int) -> bool:
        return number >= self.given and number not in self.between

    def _segment(self, number: int, segment: Segment, *, value: bool) -> dict[str, Any]:
        """`value`: of a segment that was written, what its ids mean."""
        new, ids = self._written(number), list(segment.ids or [])
        told: dict[str, Any] = {"modality": segment.modality, "written": new, "tokens": len(ids)}
        if not new:
            return told
        told["ids"] = ids
        if segment.logprobs is not None:
            told["log_probability"] = round(segment.score, 4)
        codec = self.service.codec(segment.modality)
        if not value or codec is None or not can_decode(codec):
            return told
        return {**told, **_value(codec.decode([ids])[0], self.service.kind(segment.modality), self.form)}

    async def events(self, live: Live) -> AsyncGenerator[Any, None]:
        """Each segment as it begins, its tokens with what they tell, and what it is at last."""
        now: _Segment | None = None
        try:
            async for token in live:
                if now is None or now.number != token.segment:
                    for event in [] if now is None else await now.end():
                        yield event
                    now = _Segment(self.service, token.segment, token.modality, self.form)
                    yield now.event("segment.started")
                for event in await now.add(token.id):
                    yield event
            document = await live.document()
            for event in [] if now is None else await now.end():
                yield event
            segments = [self._segment(n, s, value=False) for n, s in enumerate(document)]
            segments = await self.service.apart(lambda: [self._with_picture(s) for s in segments])
            done = {"id": self.id, "object": "document", "created": self.created, **self._facts(document, segments)}
            yield {"type": "document.done", "document": done}
        finally:
            live.cancel()

    def _with_picture(self, told: dict[str, Any]) -> dict[str, Any]:
        """Of pictures nothing is told before they are whole."""
        codec, kind = self.service.codec(told["modality"]), self.service.kind(told["modality"])
        if kind != "picture" or not told["written"] or not can_decode(codec):
            return told
        return {**told, **_value(codec.decode([told["ids"]])[0], kind, self.form)}


class _Segment:
    """A segment as it is written."""

    def __init__(self, service: Service, number: int, modality: str, form: str) -> None:
        self.number, self.modality = number, modality
        kind, codec = service.kind(modality), service.codec(modality)
        heard = kind == "sound" and can_decode(codec)
        self.growing: Growing | None = service.growing(modality) if kind in ("text", "sequence") else None
        self.voice: Voice | None = Voice(service, modality, form) if heard else None

    def event(self, kind: str, **what: Any) -> dict[str, Any]:
        return {"type": kind, "segment": self.number, "modality": self.modality, **what}

    async def add(self, token: int) -> list[dict[str, Any]]:
        text = "" if self.growing is None else self.growing.add(token)
        told = [self.event("token", id=token, **({} if self.growing is None else {"text": text}))]
        if self.voice is not None and (piece := await self.voice.add(token)):
            told.append(self.event("audio.delta", audio=_base64(piece)))
        return told

    async def end(self) -> list[dict[str, Any]]:
        told = []
        if self.voice is not None and (piece := await self.voice.end()):
            told.append(self.event("audio.delta", audio=_base64(piece)))
        if self.growing is None:
            return [*told, self.event("segment.done")]
        rest = self.growing.end()
        return [self.event("segment.done", rest=rest, text=self.growing.text)]


def _value(value: Any, kind: str | None, form: str) -> dict[str, Any]:
    """A raw value as JSON."""
    if kind in ("text", "sequence"):
        return {"text": value if isinstance(value, str) else " ".join(map(str, value))}
    if kind == "sound":
        return {"audio": {"format": form, "data": _base64(encoded(value, form))}}
    if kind == "picture":
        out = io.BytesIO()
        value.save(out, "PNG")
        return {"image": f"data:image/png;base64,{_base64(out.getvalue())}"}
    return {"values": value} if isinstance(value, list) else {}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
