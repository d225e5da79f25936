"""Spoken conversations, by the official client's own connection, and by one that does not behave."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tiny_served import NAME, client_of, running, served, served_model, voice

from zipper_lm import Segment
from zipper_lm.serve.forms import encoded
from zipper_lm.serve.limits import Limits

AT = "ws://127.0.0.1/v1/realtime"
PCM = encoded(voice(1.0), "pcm")


@pytest.fixture
def talk(openai: Any) -> Iterator[Any]:
    pytest.importorskip("websockets")
    with openai.realtime.connect(model=NAME) as connection:
        assert connection.recv().type == "session.created"
        yield connection


def speak(talk: Any, sound: bytes = PCM) -> None:
    for at in range(0, len(sound), 9600):
        talk.input_audio_buffer.append(audio=base64.b64encode(sound[at : at + 9600]).decode())
    talk.input_audio_buffer.commit()


def until(talk: Any, *kinds: str) -> list[Any]:
    """Events up to the first of these kinds."""
    events = []
    while not events or events[-1].type not in kinds:
        events.append(talk.recv())
    return events


def answer(talk: Any, **how: Any) -> list[Any]:
    talk.response.create(**({"response": how} if how else {}))
    return until(talk, "response.done", "error")


def expected(service: Any, schedule: list[str], before: Any = ()) -> Any:
    wave = np.frombuffer(PCM, "<i2").astype(np.float32) / 32768
    return service.model.generate([[*before, Segment("speech", (wave, 24_000))]], schedule)[0]


def test_push_to_talk(talk: Any, service: Any) -> None:
    """The transcript comes as it is written, and the sound of it; both are what the model writes."""
    speak(talk)
    assert [e.type for e in until(talk, "conversation.item.done")] == [
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
    ]
    events = answer(talk)
    kinds = list(dict.fromkeys(e.type for e in events))
    assert kinds == [
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        "response.output_audio_transcript.delta",
        "response.output_audio.delta",
        "response.output_audio.done",
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "response.output_item.done",
        "conversation.item.done",
        "response.done",
    ]
    document = expected(service, ["text", "speech"])
    text = "".join(e.delta for e in events if e.type == "response.output_audio_transcript.delta")
    assert text == document[1].value
    sound = b"".join(base64.b64decode(e.delta) for e in events if e.type == "response.output_audio.delta")
    assert abs(len(sound) / 48_000 - len(document[2].ids) / 25) < 0.1
    done = events[-1].response
    assert done.output[0].content[0].transcript == text
    assert done.usage.output_token_details.text_tokens == len(document[1].ids)
    assert done.usage.output_token_details.audio_tokens == len(document[2].ids)
    assert (done.status, done.status_details.reason) == ("incomplete", "max_output_tokens")


def test_text_alone(talk: Any, service: Any) -> None:
    talk.session.update(session={"type": "realtime", "output_modalities": ["text"], "max_output_tokens": 5})
    updated = talk.recv()
    assert (updated.type, updated.session.output_modalities) == ("session.updated", ["text"])
    speak(talk)
    until(talk, "conversation.item.done")
    events = answer(talk)
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == service.codec("text").decode([expected(service, ["text"])[1].ids[:5]])[0]
    assert not any("audio" in e.type for e in events)


def test_what_was_said_before_is_not_read_unless_told(talk: Any) -> None:
    texts = []
    for _ in range(2):
        speak(talk)
        until(talk, "conversation.item.done")
        texts.append(answer(talk, output_modalities=["text"])[-1].response.output[0].content[0].text)
    assert texts[0] == texts[1]


def test_earlier_turns() -> None:
    """With `turns`, an answer reads what was said and answered before."""
    openai = pytest.importorskip("openai", reason="needs the client `openai`")
    with served(turns=1) as service, running(service) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        with client.realtime.connect(model=NAME) as talk:
            talk.recv()
            found = []
            for _ in range(2):
                speak(talk)
                until(talk, "conversation.item.done")
                found.append(answer(talk, output_modalities=["text"])[-1].response.output[0].content[0].text)
        first = expected(service, ["text"])
        assert found == [first[-1].value, expected(service, ["text"], first.segments)[-1].value]
        assert found[0] != found[1]


def test_cancel_in_mid_answer(talk: Any, service: Any) -> None:
    speak(talk)
    until(talk, "conversation.item.done")
    talk.response.create()
    until(talk, "response.output_audio_transcript.delta")
    talk.response.cancel()
    done = until(talk, "response.done")[-1].response
    assert (done.status, done.status_details.reason) == ("cancelled", "client_cancelled")
    speak(talk)
    assert until(talk, "conversation.item.done")
    assert answer(talk)[-1].type == "response.done"


def test_clear(talk: Any) -> None:
    talk.input_audio_buffer.append(audio=base64.b64encode(PCM).decode())
    talk.input_audio_buffer.clear()
    assert talk.recv().type == "input_audio_buffer.cleared"
    talk.input_audio_buffer.commit()
    assert talk.recv().error.code == "input_audio_buffer_commit_empty"


def test_one_response_at_a_time(talk: Any) -> None:
    speak(talk)
    until(talk, "conversation.item.done")
    talk.response.create()
    talk.response.create(event_id="mine")
    error = until(talk, "error")[-1].error
    assert (error.code, error.event_id) == ("conversation_already_has_active_response", "mine")
    until(talk, "response.done")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"type": "conversation.item.create", "item": {}}, "type"),
        ({"type": "response.cancel"}, None),
        ({"type": "response.create"}, None),
        ({"type": "response.create", "response": {"tools": [{}]}}, "response.tools"),
        ({"type": "response.create", "response": {"input": []}}, "response.input"),
        ({"type": "session.update"}, "session"),
        ({"type": "session.update", "session": {"type": "transcription"}}, "session.type"),
        ({"type": "session.update", "session": {"type": "realtime", "model": "other"}}, "model"),
        (
            {"type": "session.update", "session": {"type": "realtime", "instructions": "Be kind"}},
            "session.instructions",
        ),
        (
            {
                "type": "session.update",
                "session": {"type": "realtime", "audio": {"input": {"turn_detection": {"type": "server_vad"}}}},
            },
            "session.audio.input.turn_detection",
        ),
        (
            {
                "type": "session.update",
                "session": {"type": "realtime", "audio": {"output": {"format": {"type": "audio/pcmu"}}}},
            },
            "session.audio.output.format",
        ),
        ({"type": "session.update", "session": {"type": "realtime", "nonsense": 1}}, "session.nonsense"),
        (
            {"type": "session.update", "session": {"type": "realtime", "max_output_tokens": 10**30}},
            "session.max_output_tokens",
        ),
        (
            {"type": "session.update", "session": {"type": "realtime", "max_output_tokens": "many"}},
            "session.max_output_tokens",
        ),
        ({"type": "input_audio_buffer.append", "audio": "!"}, "audio"),
        ({"type": "input_audio_buffer.append", "audio": 7}, "audio"),
        (
            {"type": "input_audio_buffer.append", "audio": base64.b64encode(bytes(3 << 20)).decode(), "twice": 1},
            "twice",
        ),
        ({"type": "input_audio_buffer.commit"}, None),
        ({"type": 7}, "type"),
        ({}, "type"),
    ],
)
def test_what_is_not_there_is_refused_by_name(client: Any, message: dict[str, Any], param: str | None) -> None:
    """And the conversation goes on."""
    with client.websocket_connect(f"{AT}?model={NAME}") as socket:
        socket.receive_json()
        socket.send_json({**message, "event_id": "mine"})
        told = socket.receive_json()
        assert told["type"] == "error"
        assert (told["error"]["param"], told["error"]["event_id"]) == (param, "mine")
        socket.send_json({"type": "input_audio_buffer.clear"})
        assert socket.receive_json()["type"] == "input_audio_buffer.cleared"


def test_rubbish(client: Any) -> None:
    """It is answered a hundred times, then no more."""
    from starlette.websockets import WebSocketDisconnect

    with client.websocket_connect(AT) as socket:
        socket.receive_json()
        for number in range(100):
            if number % 3 == 0:
                socket.send_text("{not json")
            elif number % 3 == 1:
                socket.send_bytes(b"\x00\xff")
            else:
                socket.send_text("[" * 5000)
            assert socket.receive_json()["type"] == "error"
        with pytest.raises(WebSocketDisconnect) as caught:
            socket.receive_json()
        assert caught.value.code == 1008


def test_half_a_character_ends_no_conversation(client: Any) -> None:
    """Its sender's own id came back to him, or would have: a half cannot be sent, and the connection was lost."""
    with client.websocket_connect(AT) as socket:
        socket.receive_json()
        socket.send_text('{"type": "response.create", "event_id": "\\ud800"}')
        assert socket.receive_json()["error"]["code"] == "invalid_json"
        socket.send_json({"type": "input_audio_buffer.clear"})
        assert socket.receive_json()["type"] == "input_audio_buffer.cleared"


def say(socket: Any, *kinds: str) -> None:
    """What ends in an answer, by a client in this process; waits for the last event of each."""
    sound = base64.b64encode(PCM).decode()
    for kind in kinds:
        socket.send_json({"type": f"input_audio_buffer.{kind}", **({"audio": sound} if kind == "append" else {})})
        if kind == "commit":
            assert [socket.receive_json()["type"] for _ in range(3)][-1] == "conversation.item.done"


def test_what_can_never_be_answered_is_forgotten() -> None:
    """It stayed committed, and every later answer was refused because of it."""
    with served(limits=Limits(ids=40)) as service, client_of(service) as client:
        with client.websocket_connect(AT) as socket:
            socket.receive_json()
            say(socket, "append", "commit", "append", "commit")  # 25 tokens each
            socket.send_json({"type": "response.create"})
            assert "40 tokens" in socket.receive_json()["error"]["message"]
            say(socket, "append", "commit")
            socket.send_json({"type": "response.create", "response": {"output_modalities": ["text"]}})
            assert socket.receive_json()["type"] == "response.created"
        assert service.state == "ok"


def test_an_error_of_the_servers_own_ends_no_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, without what it was; who asks again is answered."""
    from zipper_lm.serve.service import Service

    async def fails(*_: Any, **__: Any) -> Any:
        raise KeyError("secret")

    with served() as service, client_of(service) as client, client.websocket_connect(AT) as socket:
        socket.receive_json()
        say(socket, "append", "commit")
        with monkeypatch.context() as patched:
            patched.setattr(Service, "write", fails)
            socket.send_json({"type": "response.create"})
            told = socket.receive_json()["error"]
        assert (told["code"], "secret" in told["message"]) == ("internal_error", False)
        socket.send_json({"type": "response.create"})
        assert socket.receive_json()["type"] == "response.created"


def test_more_segments_than_one_answer_may_read() -> None:
    limits = Limits(segments=4)
    with served(limits=limits) as service, client_of(service) as client, client.websocket_connect(AT) as socket:
        socket.receive_json()
        say(socket, "append", "commit", "append", "commit", "append")
        socket.send_json({"type": "input_audio_buffer.commit"})
        assert "4 segments" in socket.receive_json()["error"]["message"]


def test_ten_thousand_messages(client: Any) -> None:
    with client.websocket_connect(AT) as socket:
        socket.receive_json()
        for _ in range(10_000):
            socket.send_json({"type": "input_audio_buffer.append", "audio": "AAAA"})
        socket.send_json({"type": "input_audio_buffer.clear"})
        assert socket.receive_json()["type"] == "input_audio_buffer.cleared"


def test_sound_without_end() -> None:
    """What is not committed is bounded, and so is what is committed and not answered."""
    limits = Limits(seconds=2.0)
    with served(limits=limits) as service, client_of(service) as client, client.websocket_connect(AT) as socket:
        socket.receive_json()
        append = {"type": "input_audio_buffer.append", "audio": base64.b64encode(bytes(60_000)).decode()}
        socket.send_json(append)
        socket.send_json(append)
        assert socket.receive_json()["error"]["code"] == "input_audio_too_long"
        socket.send_json({"type": "input_audio_buffer.commit"})
        assert [socket.receive_json()["type"] for _ in range(3)][-1] == "conversation.item.done"
        socket.send_json(append)
        socket.send_json({"type": "input_audio_buffer.commit"})
        assert socket.receive_json()["error"]["code"] == "input_audio_too_long"


def test_nothing_is_said_for_long() -> None:
    from starlette.websockets import WebSocketDisconnect

    limits = Limits(idle=0.2)
    with served(limits=limits) as service, client_of(service) as client, client.websocket_connect(AT) as socket:
        socket.receive_json()
        with pytest.raises(WebSocketDisconnect) as caught:
            socket.receive_json()
        assert caught.value.code == 1000


def test_who_may_connect() -> None:
    """A browser sends its key as the name of a protocol; pages elsewhere are refused, as are other models."""
    from starlette.testclient import WebSocketDenialResponse

    def refused(client: Any, where: str = AT, **how: Any) -> int:
        with pytest.raises(WebSocketDenialResponse) as caught, client.websocket_connect(where, **how):
            pass
        assert json.loads(caught.value.text)["error"]["message"]
        return int(caught.value.status_code)

    with served(key="k") as service, client_of(service) as client:
        assert refused(client) == 401
        assert refused(client, subprotocols=["realtime", "openai-insecure-api-key.other"]) == 401
        with client.websocket_connect(AT, subprotocols=["realtime", "openai-insecure-api-key.k"]) as socket:
            assert socket.accepted_subprotocol == "realtime"
            assert socket.receive_json()["type"] == "session.created"
    with served() as service, client_of(service) as client:
        assert refused(client, headers={"origin": "http://evil.example"}) == 403
        assert refused(client, f"{AT}?model=other") == 404
    with served(served_model(("text", "image"))) as service, client_of(service) as client:
        assert refused(client) == 404
