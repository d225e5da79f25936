"""What the official Python client sends, and how it parses the answers. Each test is a tick in docs/serving.md."""

import io
from typing import Any

import numpy as np
import pytest
import soundfile
from tiny_served import NAME, sound_file

from zipper_lm import Document
from zipper_lm.codecs.audio import read_audio
from zipper_lm.serve.forms import MEDIA


def transcribe(openai: Any, **how: Any) -> Any:
    return openai.audio.transcriptions.create(**{"model": NAME, "file": ("a.wav", sound_file()), **how})


def test_models(openai: Any) -> None:
    assert [m.id for m in openai.models.list()] == [NAME]
    assert openai.models.retrieve(NAME).object == "model"


def test_transcription(openai: Any, service: Any) -> None:
    """The text is what the model itself writes."""
    found = transcribe(openai)
    said = service.model.generate(("speech", sound_file()), ["text"])[-1]
    assert found.text == said.value
    assert found.text
    assert (found.usage.type, found.usage.input_tokens, found.usage.output_tokens) == ("tokens", 25, len(said.ids))
    assert found.usage.input_token_details.audio_tokens == 25


@pytest.mark.parametrize(
    ("form", "how"),
    [
        ("WAV", {}),
        ("FLAC", {}),
        ("MP3", {"rate": 24_000}),
        ("OGG", {"subtype": "VORBIS"}),
        ("OGG", {"subtype": "OPUS", "rate": 48_000}),
    ],
)
def test_forms_of_sound_that_are_read(openai: Any, form: str, how: dict[str, Any]) -> None:
    assert transcribe(openai, file=("a", sound_file(form, **how))).text


def test_transcription_as_text(openai: Any) -> None:
    assert transcribe(openai, response_format="text") == f"{transcribe(openai).text}\n"


def test_transcription_in_detail(openai: Any) -> None:
    """No timestamps are made up."""
    found = transcribe(openai, response_format="verbose_json", language="en")
    assert (found.text, found.language, found.duration) == (transcribe(openai).text, "en", 1.0)
    assert found.usage.seconds == 1.0
    assert found.segments is None
    assert found.words is None


def test_transcription_streams(openai: Any) -> None:
    events = list(transcribe(openai, stream=True))
    assert {e.type for e in events[:-1]} == {"transcript.text.delta"}
    done = events[-1]
    assert done.type == "transcript.text.done"
    assert "".join(e.delta for e in events[:-1]) == done.text == transcribe(openai).text
    assert done.usage.output_tokens > 0
    assert len(events) > 5


def test_a_prompt_is_read_before_the_sound(openai: Any, service: Any) -> None:
    found = transcribe(openai, prompt="one two")
    document = Document([("text", "one two"), ("speech", sound_file())])
    assert found.text == service.model.generate(document, ["text"])[-1].value
    assert found.text != transcribe(openai).text


def test_temperature(openai: Any) -> None:
    """0 is greedy; warm tokens are drawn anew for each request."""
    assert transcribe(openai, temperature=0).text == transcribe(openai).text
    assert len({transcribe(openai, temperature=1.0).text for _ in range(3)}) == 3


@pytest.mark.parametrize("form", sorted(MEDIA))
def test_speech(openai: Any, service: Any, form: str) -> None:
    """24 kHz in every form, as long as the tokens that the model writes."""
    found = openai.audio.speech.create(model=NAME, input="one two three", voice="alloy", response_format=form)
    data = found.read()
    assert found.response.headers["content-type"] == MEDIA[form]
    assert found.response.headers["x-zipper-voice"] == "default"
    if form == "pcm":
        wave = np.frombuffer(data, dtype="<i2").astype(np.float32) / 32768
    else:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            assert (sound.channels, sound.samplerate) == (1, 24_000)
        wave = read_audio(data, 24_000)
    tokens = len(service.model.generate("one two three", ["speech"])[-1].ids)
    assert abs(len(wave) / 24_000 - tokens / 25) < 0.12
    assert np.sqrt(np.mean(wave**2)) > 0.01


def test_speech_is_mp3_unless_told(openai: Any) -> None:
    found = openai.audio.speech.create(model=NAME, input="one", voice={"id": "default"})
    assert found.response.headers["content-type"] == "audio/mpeg"


def test_speech_as_events(openai: Any) -> None:
    """The pieces laid end to end are what is sent without events."""
    how = {"model": NAME, "input": "one two", "voice": "ash", "response_format": "pcm"}
    events = []
    with openai.audio.speech.with_streaming_response.create(**how, stream_format="sse") as response:
        from openai._streaming import SSEDecoder

        events = [e.json() for e in SSEDecoder().iter_bytes(response.iter_bytes())]
    import base64

    assert [e["type"] for e in events] == ["speech.audio.delta"] * (len(events) - 1) + ["speech.audio.done"]
    sound = b"".join(base64.b64decode(e["audio"]) for e in events[:-1])
    assert sound == openai.audio.speech.create(**how).read()
    usage = events[-1]["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_speech_streams(openai: Any) -> None:
    """The first sound is sent long before the last is written."""
    how = {"model": NAME, "input": "one two three", "voice": "ash", "response_format": "pcm"}
    with openai.audio.speech.with_streaming_response.create(**how) as response:
        pieces = list(response.iter_bytes())
    assert len(pieces) >= 2
    assert len(pieces[0]) <= 2 * 24_000


def test_errors_are_of_the_clients_own_kinds(openai: Any) -> None:
    import openai as package

    with pytest.raises(package.NotFoundError) as caught:
        transcribe(openai, model="whisper-1")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id.startswith("req_")
    with pytest.raises(package.BadRequestError) as refused:
        transcribe(openai, response_format="srt")
    assert refused.value.param == "response_format"
