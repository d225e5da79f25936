"""`POST /v1/audio/transcriptions`: sound to text, also as it is written."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ConfigDict, Field
from starlette.datastructures import FormData, UploadFile

from zipper_lm.data.document import Document, Segment
from zipper_lm.serve.errors import Refusal
from zipper_lm.serve.fields import Fields, check_multipart, checked
from zipper_lm.serve.heard import read_sound
from zipper_lm.serve.live import Live, unless_gone
from zipper_lm.serve.service import LANGUAGE, Service
from zipper_lm.serve.stream import Events

_LISTS = ("include", "languages", "keywords", "timestamp_granularities", "known_speaker_names")
_UNDETERMINED = "und"  # ISO 639-2: who asks does not say, and the model does not either


class TranscriptionFields(Fields):
    """Fields of the form beside its file."""

    model_config = ConfigDict(strict=False)  # a form has text alone
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "include": ((), []),
        "chunking_strategy": (),
        "timestamp_granularities": ((), []),
        "languages": ((), []),
        "keywords": ((), []),
        "known_speaker_names": ((), []),
        "known_speaker_references": ((), []),
    }

    model: str
    language: str | None = Field(None, pattern=LANGUAGE)
    prompt: str | None = Field(None, max_length=4096)
    response_format: Literal["json", "text", "verbose_json"] = "json"
    temperature: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    stream: bool = False


def routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/audio/transcriptions")
    async def transcribe(request: Request) -> Response:
        """Write down what is said in a sound."""
        check_multipart(request)
        async with request.form(max_files=1, max_fields=32) as form:
            fields, file = _fields(form)
            data = await file.read()
        return await unless_gone(request, _answer(service, fields, data))

    return router


def _fields(form: FormData) -> tuple[TranscriptionFields, UploadFile]:
    given: dict[str, Any] = {}
    for name in form:
        values = form.getlist(name)
        name = name.removesuffix("[]")
        given[name] = values if name in _LISTS else values[-1]
    file = given.pop("file", None)
    if not isinstance(file, UploadFile):
        raise Refusal(400, "file is missing", param="file", code="missing_required_parameter")
    if wrong := [name for name, value in given.items() if isinstance(value, UploadFile)]:
        raise Refusal(400, f"{wrong[0][:80]} must be no file", param=wrong[0][:80], code="invalid_value")
    return checked(TranscriptionFields, given), file


async def _answer(service: Service, fields: TranscriptionFields, data: bytes) -> Response:
    service.check_model(fields.model)
    text, sound = service.modality("text"), service.modality("sound")
    service.check_reads(text, sound)
    check_language(service, fields.language)
    if fields.stream and fields.response_format == "verbose_json":
        message = "response_format=verbose_json is not streamed: events have the text alone"
        raise Refusal(400, message, param="response_format", code="invalid_value")
    wave, rate = await service.apart(read_sound, data, service.limits, "file")
    seconds = len(wave) / rate
    before, params = ([Segment(text, fields.prompt)], ["prompt", "file"]) if fields.prompt else ([], ["file"])
    changes = {text: temperature_of(fields.temperature)}
    live = await service.write(Document([*before, Segment(sound, (wave, rate))]), [text], changes, params=params)
    service.metrics.sound.labels("read").inc(seconds)
    if fields.stream:
        return Events(_events(service, live, text), service.limits.stall)
    try:
        document = await live.document()
    finally:
        live.cancel()
    said = await service.apart(lambda: service.codec(text).decode([document[-1].ids or []])[0])
    if fields.response_format == "text":
        return PlainTextResponse(f"{said}\n")
    if fields.response_format == "json":
        return JSONResponse({"text": said, "usage": usage_of(service, document, text)})
    return JSONResponse(
        {
            "task": "transcribe",
            "language": fields.language or service.language or _UNDETERMINED,
            "duration": round(seconds, 3),
            "text": said,
            "usage": {"type": "duration", "seconds": round(seconds, 3)},
        }
    )


async def _events(service: Service, live: Live, text: str) -> AsyncGenerator[Any, None]:
    growing = service.growing(text)
    try:
        async for token in live:
            if new := growing.add(token.id):
                yield {"type": "transcript.text.delta", "delta": new}
        document = await live.document()
        if new := growing.end():
            yield {"type": "transcript.text.delta", "delta": new}
        yield {"type": "transcript.text.done", "text": growing.text, "usage": usage_of(service, document, text)}
    finally:
        live.cancel()


def check_language(service: Service, language: str | None) -> None:
    """Raise `Refusal` for another language than the model's, where that is known."""
    if language is None or service.language is None:
        return
    if _primary(language) != _primary(service.language):
        raise Refusal(
            400, f"language={language!r}: this model's is {service.language!r}", param="language", code="invalid_value"
        )


def _primary(language: str) -> str:
    return language.lower().replace("_", "-").partition("-")[0]


def temperature_of(temperature: float | None) -> dict[str, Any]:
    """The change of settings that a temperature is: 0 is the likeliest token."""
    if temperature is None:
        return {}
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}
    return {"do_sample": True, "temperature": temperature}


def usage_of(service: Service, document: Document, written: str) -> dict[str, Any]:
    """Tokens read and written, as OpenAI counts them; the last segment was written."""
    sound = sum(len(s.ids or []) for s in document.segments[:-1] if service.kind(s.modality) == "sound")
    read, wrote = sum(len(s.ids or []) for s in document.segments[:-1]), len(document[-1].ids or [])
    return {
        "type": "tokens",
        "input_tokens": read,
        "output_tokens": wrote,
        "total_tokens": read + wrote,
        "input_token_details": {"audio_tokens": sound, "text_tokens": read - sound},
    }
