"""Pipecat's services for OpenAI, in a pipeline of its own. Run by `make test-clients`."""

import asyncio
from typing import Any

import pytest
from tiny_served import NAME, voice

pytest.importorskip("pipecat", reason="needs the extra `clients`")

from pipecat.frames.frames import (
    ErrorFrame,
    InputAudioRawFrame,
    TranscriptionFrame,
    TTSAudioRawFrame,
    TTSSpeakFrame,
    VADUserStartedSpeakingFrame,
    VADUserStoppedSpeakingFrame,
)
from pipecat.pipeline.worker import PipelineParams
from pipecat.services.openai.stt import OpenAISTTService
from pipecat.services.openai.tts import OpenAITTSService
from pipecat.tests.utils import SleepFrame, run_test


def run(processor: Any, frames: list[Any], rate: int) -> list[Any]:
    params = PipelineParams(audio_in_sample_rate=rate, audio_out_sample_rate=rate)
    down, up = asyncio.run(run_test(processor, frames_to_send=frames, pipeline_params=params, start_timeout=30.0))
    errors = [frame for frame in (*down, *up) if isinstance(frame, ErrorFrame)]
    assert not errors
    return list(down)


def test_speech(address: str, service: Any) -> None:
    how = OpenAITTSService.Settings(model=NAME, voice="alloy")
    speaker = OpenAITTSService(api_key="none", base_url=f"{address}/v1", settings=how)
    heard = run(speaker, [TTSSpeakFrame("one two three"), SleepFrame(5.0)], 24_000)
    sound = b"".join(frame.audio for frame in heard if isinstance(frame, TTSAudioRawFrame))
    assert {frame.sample_rate for frame in heard if isinstance(frame, TTSAudioRawFrame)} == {24_000}
    tokens = len(service.model.generate("one two three", ["speech"])[-1].ids)
    assert abs(len(sound) / 48_000 - tokens / 25) < 0.2


class Listener(OpenAISTTService):
    """Keeps the sound file that it sends."""

    async def _transcribe(self, audio: bytes) -> Any:
        self.heard = audio
        return await super()._transcribe(audio)


def test_transcription(address: str, service: Any) -> None:
    how = OpenAISTTService.Settings(model=NAME)
    listener = Listener(api_key="none", base_url=f"{address}/v1", settings=how)
    samples = (voice(1.0) * 32767).astype("<i2").tobytes()
    parts = [samples[at : at + 6400] for at in range(0, len(samples), 6400)]
    frames = [
        VADUserStartedSpeakingFrame(),
        *(InputAudioRawFrame(part, 16_000, 1) for part in parts),
        SleepFrame(0.2),
        VADUserStoppedSpeakingFrame(),
        SleepFrame(5.0),
    ]
    said = [frame.text for frame in run(listener, frames, 16_000) if isinstance(frame, TranscriptionFrame)]
    assert said == [service.model.generate(("speech", listener.heard), ["text"])[-1].value]
