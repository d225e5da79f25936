"""What a spoken conversation has agreed on: the part of OpenAI's session that is followed here, under its names."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, StrictFloat, StrictInt

from zipper_lm.serve.errors import Refusal
from zipper_lm.serve.fields import Fields, checked
from zipper_lm.serve.forms import RATE
from zipper_lm.serve.speech import OWN_VOICE, VoiceId, voice_of

FORMAT = {"type": "audio/pcm", "rate": RATE}
Nothing = tuple[Any, ...]


class Input(Fields):
    """How sound comes in. Who speaks says so: nothing here listens for when they have done."""

    unsupported: ClassVar[dict[str, Nothing]] = {"noise_reduction": (), "transcription": (), "turn_detection": ()}

    format: dict[str, Any] | None = None


class Output(Fields):
    """How sound goes out."""

    format: dict[str, Any] | None = None
    speed: StrictInt | StrictFloat | None = None
    voice: str | VoiceId | None = None


class Audio(Fields):
    """Both."""

    input: dict[str, Any] | None = None
    output: dict[str, Any] | None = None


class Changes(Fields):
    """What one message asks for."""

    unsupported: ClassVar[dict[str, Nothing]] = {
        "include": ([],),
        "input": (),
        "instructions": ("",),
        "parallel_tool_calls": (True, False),
        "prompt": (),
        "reasoning": (),
        "tool_choice": ("auto", "none"),
        "tools": ([],),
        "tracing": (),
        "truncation": ("auto", "disabled"),
    }

    audio: dict[str, Any] | None = None
    max_output_tokens: Literal["inf"] | StrictInt | None = None
    output_modalities: list[Literal["text", "audio"]] | None = Field(None, min_length=1, max_length=1)


class SessionChanges(Changes):
    """Of the session."""

    type: Literal["realtime"]
    model: str | None = None


class ResponseChanges(Changes):
    """Of one response."""

    conversation: Literal["auto", "none"] | None = None
    metadata: dict[str, str] | None = None


class Session:
    """What holds for the next response.

    Args:
        model: the model's name. speaks: whether it can be heard. id: of the session.
    """

    def __init__(self, model: str, speaks: bool, id: str) -> None:
        self.model, self.id = model, id
        self.modality: Literal["text", "audio"] = "audio" if speaks else "text"
        self.most: int | None = None
        self.voice = OWN_VOICE

    def changed(self, changes: Changes, within: str) -> Session:
        """A copy that holds what a message asks for.

        Raises:
            Refusal: for what is not followed.
        """
        new = Session(self.model, True, self.id)
        new.modality, new.most, new.voice = self.modality, self.most, self.voice
        if changes.output_modalities is not None:
            new.modality = changes.output_modalities[0]
        if changes.max_output_tokens is not None:
            new.most = None if changes.max_output_tokens == "inf" else changes.max_output_tokens
            if new.most is not None and new.most < 1:
                raise Refusal(400, "max_output_tokens must be at least 1", param=f"{within}max_output_tokens")
        if changes.audio is not None:
            audio = checked(Audio, changes.audio, f"{within}audio.")
            if audio.input is not None:
                _check_format(
                    checked(Input, audio.input, f"{within}audio.input.").format, f"{within}audio.input.format"
                )
            if audio.output is not None:
                new._change_output(checked(Output, audio.output, f"{within}audio.output."), f"{within}audio.output.")
        return new

    def _change_output(self, output: Output, within: str) -> None:
        _check_format(output.format, f"{within}format")
        if output.speed not in (None, 1):
            raise Refusal(400, f"speed={output.speed} is not supported: it must be 1", param=f"{within}speed")
        if output.voice is not None:
            voice_of(output.voice)
            self.voice = output.voice if isinstance(output.voice, str) else output.voice.id

    def told(self) -> dict[str, Any]:
        """As clients parse it."""
        return {
            "id": self.id,
            "object": "realtime.session",
            "type": "realtime",
            "model": self.model,
            "output_modalities": [self.modality],
            "instructions": "",
            "max_output_tokens": self.most or "inf",
            "tools": [],
            "tool_choice": "none",
            "tracing": None,
            "truncation": "disabled",
            "include": None,
            "audio": {
                "input": {"format": FORMAT, "noise_reduction": None, "transcription": None, "turn_detection": None},
                "output": {"format": FORMAT, "speed": 1.0, "voice": self.voice},
            },
        }


def _check_format(given: dict[str, Any] | None, param: str) -> None:
    if given is not None and {**FORMAT, **given} != FORMAT:
        raise Refusal(400, f"{param} must be {FORMAT}", param=param, code="invalid_value")
