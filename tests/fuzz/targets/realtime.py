"""Spoken conversations with `zipper serve`: messages in any order, and what should be none."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from fuzz.grammar import TEXTS, as_json, changed
from fuzz.target import Target
from fuzz.targets import server
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from tiny_served import NAME, voice

PCM = base64.b64encode((voice(0.2, rate=24_000) * 32767).astype("<i2").tobytes()).decode()
MESSAGES: list[Any] = [
    {"type": "input_audio_buffer.append", "audio": PCM},
    {"type": "input_audio_buffer.commit"},
    {"type": "response.create"},
    {
        "type": "response.create",
        "response": {"output_modalities": ["text"], "max_output_tokens": 2, "metadata": {"a": "b"}},
    },
    {"type": "response.cancel", "event_id": "mine"},
    {"type": "input_audio_buffer.clear"},
    {
        "type": "session.update",
        "session": {
            "type": "realtime",
            "model": NAME,
            "output_modalities": ["audio"],
            "audio": {
                "input": {"format": {"type": "audio/pcm", "rate": 24000}, "turn_detection": None},
                "output": {"voice": "alloy", "speed": 1.0},
            },
        },
    },
]
WORDS = [
    "text",
    "audio",
    "inf",
    "realtime",
    PCM,
    PCM[:7],
    "session",
    "response",
    "conversation",
    "none",
    "auto",
    "tools",
    "voice",
]
_LAST = {"type": "nonsense", "event_id": "the end"}


def make() -> Target:
    """Of up to seven messages."""
    return Target(name="realtime", run=run, share=10, inputs=_inputs(), around=server.around)


def run(data: bytes, folder: Path) -> None:
    """Each message is followed or answered by an error, and the connection stays."""
    with server.client().websocket_connect("/v1/realtime", headers={"host": "127.0.0.1"}) as socket:
        for message in json.loads(data):
            if isinstance(message, str):
                socket.send_text(message.encode("utf-8", "replace").decode())
            else:
                socket.send_text(as_json(message).decode())
        socket.send_text(json.dumps(_LAST))
        told: dict[str, Any] = {}
        while not (told.get("type") == "error" and told["error"]["event_id"] == "the end"):
            told = socket.receive_json()
            if told["type"] == "error" and told["error"]["type"] == "server_error":
                raise AssertionError(told)
            if told["type"] == "response.done" and "server_error" in json.dumps(told):
                raise AssertionError(told)
    server.check(server.client().get("/v1/models"))


@st.composite
def _inputs(draw: DrawFn) -> bytes:
    usual = st.sampled_from(MESSAGES)
    odd = st.one_of(changed(MESSAGES, WORDS), changed(MESSAGES, WORDS), st.sampled_from(TEXTS))
    messages = draw(st.lists(st.one_of(usual, odd, odd), min_size=1, max_size=6))
    if draw(st.booleans()):
        messages = [*MESSAGES[:2], *messages]
    return as_json(messages)
