"""Messages of a chat: who says what, in text, sound and pictures."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from zipper_lm.data.document import Document
from zipper_lm.serve.errors import Refusal
from zipper_lm.serve.fields import Fields, checked
from zipper_lm.serve.reading import Reading
from zipper_lm.serve.service import Service
from zipper_lm.serve.template import chat_ids


class Message(Fields):
    """One message of a chat."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "audio": (),
        "function_call": (),
        "name": ("",),
        "refusal": ("",),
        "tool_calls": ([],),
        "annotations": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Any]


class TextPart(Fields):
    """Some text."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"prompt_cache_breakpoint": ()}

    type: Literal["text"]
    text: str


class SoundData(Fields):
    """A sound file: its format shows in its bytes."""

    data: str
    format: Literal["wav", "mp3", "flac", "opus", "ogg"]


class SoundPart(Fields):
    """Some sound."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"prompt_cache_breakpoint": ()}

    type: Literal["input_audio"]
    input_audio: dict[str, Any]


class PictureUrl(Fields):
    """Where a picture is."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"detail": ("auto",)}

    url: str


class PicturePart(Fields):
    """A picture."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"prompt_cache_breakpoint": ()}

    type: Literal["image_url"]
    image_url: dict[str, Any]


async def given_by(service: Service, messages: list[Any]) -> tuple[Document | list[int], list[str]]:
    """A document of all that messages say, and the field that each of its segments came in; where that is text alone,
    the ids of a chat, which all of the messages make.

    Raises:
        Refusal: for a message or part of another form, and for what the model has no modality for.
    """
    messages = [checked(Message, given, f"messages.{n}.") for n, given in enumerate(messages)]
    if len(messages) > service.limits.segments:
        raise Refusal(400, f"more than {service.limits.segments} messages", param="messages", code="invalid_value")
    text, reading, alone = service.modality("text"), Reading(service), True
    chat: list[dict[str, str]] = []
    for number, message in enumerate(messages):
        texts: list[str] = []
        for place, part in enumerate(_parts(message)):
            param = f"messages.{number}.content.{place}"
            kind, value = _part(part, param)
            if kind == "text":
                reading.text(text, value, param)
                texts.append(value)
            else:
                alone = False
                name = service.modality("sound" if kind == "input_audio" else "picture")
                service.check_reads(text, name)
                await (reading.sound if kind == "input_audio" else reading.picture)(name, value, param)
        chat.append({"role": "system" if message.role == "developer" else message.role, "content": "\n".join(texts)})
    if alone:
        return await service.apart(chat_ids, service.codec(text), chat, service.name), ["messages"]
    said = [(s, param) for s, param in zip(reading.segments, reading.params, strict=True) if s.value != ""]
    return Document([s for s, _ in said]), [param for _, param in said]


def _parts(message: Message) -> list[Any]:
    return [{"type": "text", "text": message.content}] if isinstance(message.content, str) else message.content


def _part(part: Any, param: str) -> tuple[str, str]:
    """The kind of a part of a message, and what it says."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return kind, checked(TextPart, part, f"{param}.").text
    if kind == "input_audio":
        sound = checked(SoundPart, part, f"{param}.").input_audio
        return kind, checked(SoundData, sound, f"{param}.input_audio.").data
    if kind == "image_url":
        picture = checked(PicturePart, part, f"{param}.").image_url
        return kind, checked(PictureUrl, picture, f"{param}.image_url.").url
    raise Refusal(
        400,
        f"{param}: type must be text, input_audio or image_url, got {str(kind)[:80]!r}",
        param=param,
        code="invalid_value",
    )
