"""`POST /v1/chat/completions`: text, sound and pictures in; text, and the same spoken, out."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StrictFloat, StrictInt

from zipper_lm.serve.answer import Answer, Usage
from zipper_lm.serve.errors import Refusal
from zipper_lm.serve.fields import Fields, check_stops, checked, json_fields
from zipper_lm.serve.live import unless_gone
from zipper_lm.serve.messages import given_by
from zipper_lm.serve.service import Service
from zipper_lm.serve.speech import VOICE_HEADER, VoiceId, voice_of
from zipper_lm.serve.stream import Events

Number = StrictInt | StrictFloat
_FORMS = {"wav": "wav", "mp3": "mp3", "flac": "flac", "opus": "opus", "pcm16": "pcm"}


class AudioFields(Fields):
    """How an answer is spoken."""

    format: Literal["wav", "mp3", "flac", "opus", "pcm16"]
    voice: str | VoiceId = "default"


class StreamFields(Fields):
    """What is streamed beside the answer."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}

    include_usage: bool = False


class ChatFields(Fields):
    """The request's body."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logit_bias": ({},),
        "logprobs": (False,),
        "metadata": ({},),
        "moderation": (),
        "n": (1,),
        "parallel_tool_calls": (True, False),  # of no tools
        "prediction": (),
        "presence_penalty": (0,),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "verbosity": (),
        "web_search_options": (),
    }

    model: str
    messages: list[Any] = Field(min_length=1)
    modalities: list[Literal["text", "audio"]] | None = None
    audio: dict[str, Any] | None = None
    max_tokens: StrictInt | None = Field(None, ge=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    temperature: Number | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: Number | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: StrictInt | None = Field(None, ge=0, lt=2**62)
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    # Who asks: nothing that a model reads.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


def routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        """Answer a chat."""
        fields = await json_fields(request, ChatFields)
        return await unless_gone(request, _answer(service, fields))

    return router


async def _answer(service: Service, fields: ChatFields) -> Response:
    service.check_model(fields.model)
    streaming = checked(StreamFields, fields.stream_options, "stream_options.") if fields.stream_options else None
    if streaming is not None and not fields.stream:
        raise Refusal(400, "stream_options go with stream=true", param="stream_options", code="invalid_value")
    audio = _audio_of(fields)
    answer = Answer(service, None if audio is None else _FORMS[audio.format], _changes(service, fields), _stops(fields))
    await answer.begin(*await given_by(service, fields.messages))
    told = _Told(service.name, spoken=audio is not None)
    headers = {} if audio is None else {VOICE_HEADER: voice_of(audio.voice)}
    if fields.stream:
        usage = streaming is not None and streaming.include_usage
        return Events(_chunks(answer, told, usage), service.limits.stall, headers)
    pieces = [piece async for piece in answer.pieces()]
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if audio is not None:
        data = b"".join(piece.sound for piece in pieces)
        message |= {"content": None, "audio": told.audio(data=_base64(data), transcript=answer.text)}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
    return JSONResponse(told.body("chat.completion", [choice], usage=_usage(answer.usage)), headers=headers)


class _Told:
    """What every part of one answer says of it."""

    def __init__(self, model: str, spoken: bool) -> None:
        self.model, self.created, self.spoken = model, int(time.time()), spoken
        self.id, self.audio_id = f"chatcmpl-{uuid.uuid4().hex}", f"audio_{uuid.uuid4().hex}"

    def body(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": None,
            **more,
        }

    def audio(self, **what: Any) -> dict[str, Any]:
        """`expires_at`: at once, for nothing is kept."""
        return {"id": self.audio_id, "expires_at": self.created, **what}

    def chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return self.body("chat.completion.chunk", [choice], **more)


async def _chunks(answer: Answer, told: _Told, with_usage: bool) -> AsyncGenerator[Any, None]:
    empty = {"usage": None} if with_usage else {}
    async with aclosing(answer.pieces()) as pieces:
        yield told.chunk({"role": "assistant", "content": None if told.spoken else ""}, **empty)
        async for piece in pieces:
            if piece.sound:
                yield told.chunk({"audio": {"id": told.audio_id, "data": _base64(piece.sound)}}, **empty)
            elif told.spoken:
                yield told.chunk({"audio": {"id": told.audio_id, "transcript": piece.text}}, **empty)
            else:
                yield told.chunk({"content": piece.text}, **empty)
    yield told.chunk({"audio": told.audio()} if told.spoken else {}, answer.finish, **empty)
    if with_usage:
        yield told.body("chat.completion.chunk", [], usage=_usage(answer.usage))
    yield "[DONE]"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _audio_of(fields: ChatFields) -> AudioFields | None:
    spoken = "audio" in (fields.modalities or ())
    if spoken and fields.audio is None:
        raise Refusal(400, "modalities has audio, so audio={format, voice} is needed", param="audio")
    if fields.audio is None:
        return None
    if not spoken:
        raise Refusal(400, "audio goes with modalities=['text', 'audio']", param="audio", code="invalid_value")
    audio = checked(AudioFields, fields.audio, "audio.")
    voice_of(audio.voice)
    return audio


def _stops(fields: ChatFields) -> list[str]:
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    check_stops(stops, "stop")
    return stops


def _changes(service: Service, fields: ChatFields) -> dict[str, dict[str, Any]]:
    """Of settings: lengths hold for the text, how tokens are drawn for all that is written."""
    drawn: dict[str, Any] = {}
    if fields.temperature == 0:
        drawn = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}
    elif fields.temperature is not None or fields.top_p not in (None, 1):
        drawn = {"do_sample": True, "temperature": float(fields.temperature or 1.0), "top_p": float(fields.top_p or 1)}
    text = service.modality("text")
    kept = service.model.generation_settings.get(text, {})
    if fields.seed is not None and drawn.get("do_sample", kept.get("do_sample")):
        drawn["seed"] = fields.seed
    if fields.max_tokens and fields.max_completion_tokens:
        raise Refusal(400, "max_tokens and max_completion_tokens are the same: give one", param="max_tokens")
    most = fields.max_completion_tokens or fields.max_tokens
    service.check_most(most, "max_tokens" if fields.max_tokens else "max_completion_tokens")
    own = {**drawn, **({} if most is None else {"max_new_tokens": most})}
    if "audio" not in (fields.modalities or ()):
        return {text: own}
    return {text: own, service.speaker(): drawn}


def _usage(usage: Usage) -> dict[str, Any]:
    read, wrote = sum(usage.read.values()), sum(usage.written.values())
    return {
        "prompt_tokens": read,
        "completion_tokens": wrote,
        "total_tokens": read + wrote,
        "prompt_tokens_details": _details(usage.read),
        "completion_tokens_details": _details(usage.written),
    }


def _details(counts: dict[str, int]) -> dict[str, int]:
    theirs = {"text": "text_tokens", "sound": "audio_tokens", "picture": "image_tokens"}
    return {name: counts[kind] for kind, name in theirs.items() if kind in counts}
