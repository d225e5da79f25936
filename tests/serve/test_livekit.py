"""LiveKit's plugin for OpenAI. Run by `make test-clients`."""

import asyncio
from typing import Any

import pytest
from tiny_served import NAME, voice

pytest.importorskip("livekit.plugins.openai", reason="needs the extra `clients`")

from livekit import rtc
from livekit.agents import utils
from livekit.plugins import openai as plugin


def test_speech(address: str, service: Any) -> None:
    """As events, which it asks for, of MP3, which it decodes."""

    async def speak() -> float:
        async with utils.http_context.open():
            speaker = plugin.TTS(model=NAME, voice="ash", base_url=f"{address}/v1", api_key="none")
            return sum([event.frame.duration async for event in speaker.synthesize("one two three")])

    tokens = len(service.model.generate("one two three", ["speech"])[-1].ids)
    assert abs(asyncio.run(speak()) - tokens / 25) < 0.2


def test_transcription(address: str, service: Any) -> None:
    samples = (voice(1.0) * 32767).astype("<i2")

    async def listen() -> str:
        async with utils.http_context.open():
            listener = plugin.STT(model=NAME, language="en", base_url=f"{address}/v1", api_key="none")
            frame = rtc.AudioFrame(samples.tobytes(), 16_000, 1, len(samples))
            event = await listener.recognize([frame])
            return str(event.alternatives[0].text)

    document = service.model.generate(("speech", (samples, 16_000)), ["text"])
    assert asyncio.run(listen()) == document[-1].value
