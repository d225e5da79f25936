"""`POST /v1/audio/speech`: text to sound, sent while it is written."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, StrictFloat, StrictInt

from zipper_lm.data.document import Document, Segment
from zipper_lm.serve.errors import Refusal
from zipper_lm.serve.fields import Fields, json_fields
from zipper_lm.serve.forms import MEDIA
from zipper_lm.serve.live import Live, unless_gone
from zipper_lm.serve.service import Service
from zipper_lm.serve.stream import Events, Stream
from zipper_lm.serve.voice import Voice

OWN_VOICE = "default"
_THEIRS = (
    "alloy",
    "ash",
    "ballad",
    "cedar",
    "coral",
    "echo",
    "fable",
    "marin",
    "nova",
    "onyx",
    "sage",
    "shimmer",
    "verse",
)
VOICE_HEADER = "x-zipper-voice"


class VoiceId(Fields):
    """A voice by its id."""

    id: str


class SpeechFields(Fields):
    """The request's body."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"instructions": ("",)}

    model: str
    input: str = Field(min_length=1)
    voice: str | VoiceId
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm"] = "mp3"
    speed: StrictInt | StrictFloat = 1.0
    stream_format: Literal["audio", "sse"] = "audio"


def routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/audio/speech")
    async def speak(request: Request) -> Response:
        """Say a text."""
        fields = await json_fields(request, SpeechFields)
        return await unless_gone(request, _answer(service, fields))

    return router


async def _answer(service: Service, fields: SpeechFields) -> Response:
    service.check_model(fields.model)
    text, sound = service.modality("text"), service.speaker()
    service.check_reads(sound, text)
    if len(fields.input) > (most := service.limits.characters):
        raise Refusal(
            400, f"input has {len(fields.input)} characters, the limit is {most}", param="input", code="string_too_long"
        )
    if fields.speed != 1:
        raise Refusal(400, f"speed={fields.speed} is not supported: it must be 1", param="speed", code="invalid_value")
    headers = {VOICE_HEADER: voice_of(fields.voice)}
    live = await service.write(Document([Segment(text, fields.input)]), [sound], {}, params=["input"])
    stall, form = service.limits.stall, fields.response_format
    if fields.stream_format == "audio":
        return Stream(_pieces(service, live, sound, form), MEDIA[form], stall, headers)
    return Events(_events(service, live, sound, form), stall, headers)


def voice_of(voice: str | VoiceId) -> str:
    """The model's voice that a name stands for: a codec has one. Raises `Refusal` for a name that nobody knows."""
    name = voice if isinstance(voice, str) else voice.id
    if isinstance(voice, VoiceId):
        voice.refuse_rest("voice.")
    if name != OWN_VOICE and name not in _THEIRS:
        raise Refusal(
            400,
            f"voice={name[:80]!r} is unknown: there is {OWN_VOICE!r}, which the names {', '.join(_THEIRS)} stand for",
            param="voice",
            code="invalid_value",
        )
    return OWN_VOICE


async def _pieces(service: Service, live: Live, sound: str, form: str) -> AsyncGenerator[bytes, None]:
    voice = Voice(service, sound, form)
    try:
        async for token in live:
            if piece := await voice.add(token.id):
                yield piece
        await live.document()  # raises what the engine met
        yield await voice.end()
    finally:
        live.cancel()


async def _events(service: Service, live: Live, sound: str, form: str) -> AsyncGenerator[Any, None]:
    async with aclosing(_pieces(service, live, sound, form)) as pieces:
        async for piece in pieces:
            yield {"type": "speech.audio.delta", "audio": base64.b64encode(piece).decode()}
    document = await live.document()
    read, wrote = len(document[0].ids or []), len(document[-1].ids or [])
    usage = {"input_tokens": read, "output_tokens": wrote, "total_tokens": read + wrote}
    yield {"type": "speech.audio.done", "usage": usage}
