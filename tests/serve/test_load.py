"""Many clients, and those that go away, send slowly, or do not read."""

import asyncio
import base64
import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
from tiny_served import NAME, client_of, running, served, served_model, sound_file

from zipper_lm.serve.forms import encoded
from zipper_lm.serve.limits import Limits
from zipper_lm.serve.stream import Stream

LONG = 1500  # tokens; nobody waits for them


@pytest.fixture(scope="module")
def endless() -> Any:
    """A model that writes long segments."""
    model = served_model(("text", "speech"), tokens=LONG)
    for settings in model.generation_settings.values():
        settings["min_new_tokens"] = LONG
    return model


@pytest.fixture
def long(endless: Any) -> Iterator[tuple[Any, str]]:
    with served(endless, limits=Limits(documents=3)) as service, running(service) as address:
        yield service, address


def begin(address: str, route: str, body: bytes, kind: str = "application/json") -> socket.socket:
    """Send one request; the answer is left to be read."""
    at = urlsplit(address)
    connection = socket.create_connection((at.hostname, at.port), timeout=30)
    head = f"POST {route} HTTP/1.1\r\nhost: {at.netloc}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def document(stream: bool, schedule: str = "text") -> bytes:
    given = [{"modality": "text", "text": "one"}, {"modality": "speech", "ids": [5, 6]}]
    return json.dumps({"model": NAME, "document": given, "schedule": schedule, "stream": stream}).encode()


def told_by(connection: socket.socket, last: bytes = b"\0") -> bytes:
    """What a server says, up to some words or its end."""
    told = b""
    while last not in told and (more := connection.recv(4000)):
        told += more
    return told


def wait_for(what: Any, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def written(service: Any) -> int:
    counted = re.findall(r"zipper_tokens_total\{.*\} ([\d.]+)", service.metrics.page().decode())
    return int(sum(map(float, counted)))


def answers(address: str, number: int) -> Any:
    """What one client is told, of one of five kinds."""
    at = urlsplit(address)
    connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=120)
    kind, variant = number % 5, number // 5 % 2
    text = ("one", "two three")[variant]
    sound = base64.b64encode(sound_file(seed=variant)).decode()
    part = {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}
    how = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
    route, body = [
        ("/v1/audio/speech", {"input": text, "voice": "alloy", "response_format": "pcm"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}], **how}),
        ("/v1/documents", {"document": [{"modality": "speech", "audio": sound}], "schedule": ["text", "speech"]}),
        ("/v1/documents", {"document": [{"modality": "text", "text": text}], "schedule": ["speech"], "stream": True}),
    ][kind]
    connection.request("POST", route, json.dumps({"model": NAME, **body}), {"content-type": "application/json"})
    response = connection.getresponse()
    data = response.read()
    assert response.status == 200, data
    told = re.sub(rb'"(id|created|expires_at)":("[^"]*"|\d+)', b"", data) if kind else data
    return kind, variant, re.sub(rb'"id":"[^"]*"', b"", told)


def test_none_is_lost_and_none_is_mixed_up() -> None:
    """Twenty clients at once are told what each is told alone, and none has a thread of its own."""
    with served(slots=4) as service, running(service) as address:
        alone = {answer[:2]: answer[2] for answer in (answers(address, number) for number in range(10))}
        before, most = threading.active_count(), 0
        with ThreadPoolExecutor(20) as pool:
            waiting = [pool.submit(answers, address, number) for number in range(20)]
            while not all(each.done() for each in waiting):
                most = max(most, threading.active_count())
                time.sleep(0.01)
            together = [each.result() for each in waiting]
        assert all(alone[kind, variant] == told for kind, variant, told in together)
        assert most <= before + 20 + 2  # the clients' own
        wait_for(lambda: service.documents == 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("schedule", ["text", "speech"])
def test_a_client_that_goes_away_frees_its_rows(long: tuple[Any, str], stream: bool, schedule: str) -> None:
    service, address = long
    connection = begin(address, "/v1/documents", document(stream, schedule))
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    wait_for(lambda: written(service) > 0)
    connection.close()
    wait_for(lambda: service.engine.pending == 0)
    assert written(service) < LONG
    wait_for(lambda: service.documents == 0)
    assert "zipper_cancelled_total 1.0" in service.metrics.page().decode()


def test_a_conversation_that_breaks_off(long: tuple[Any, str]) -> None:
    websockets = pytest.importorskip("websockets.sync.client")
    service, address = long
    talk = websockets.connect(f"ws{address.removeprefix('http')}/v1/realtime")
    sound = base64.b64encode(encoded_second()).decode()
    for message in ({"type": "input_audio_buffer.append", "audio": sound}, {"type": "input_audio_buffer.commit"}):
        talk.send(json.dumps(message))
    talk.send(json.dumps({"type": "response.create"}))
    wait_for(lambda: written(service) > 0)
    talk.socket.close()
    wait_for(lambda: service.engine.pending == 0)
    assert written(service) < LONG


def encoded_second() -> bytes:
    from tiny_served import voice

    return encoded(voice(1.0), "pcm")


def test_a_client_that_goes_away_while_its_sound_is_read(
    long: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that encodes cannot be stopped; what it hands to the engine is not written."""
    service, address = long
    codec, begun, go_on = service.codec("speech"), threading.Event(), threading.Event()
    encode = codec.encode

    def slowly(values: Any) -> Any:
        begun.set()
        assert go_on.wait(20)
        return encode(values)

    monkeypatch.setattr(codec, "encode", slowly)
    sound = base64.b64encode(sound_file()).decode()
    body = {"model": NAME, "document": [{"modality": "speech", "audio": sound}], "schedule": "text"}
    connection = begin(address, "/v1/documents", json.dumps(body).encode())
    assert begun.wait(20)
    connection.close()
    time.sleep(0.2)
    go_on.set()
    wait_for(lambda: service.documents == 0)
    assert written(service) < LONG


def test_more_clients_than_are_served(long: tuple[Any, str]) -> None:
    """429 with Retry-After; and when somebody leaves, there is room again."""
    service, address = long
    connections = [begin(address, "/v1/documents", document(True)) for _ in range(3)]
    wait_for(lambda: service.documents == 3)
    refused = told_by(begin(address, "/v1/documents", document(True)), b"}}").decode()
    assert refused.startswith("HTTP/1.1 429")
    assert "retry-after: 1" in refused
    assert '"type":"rate_limit_error"' in refused
    connections[0].close()
    wait_for(lambda: service.documents == 2)
    assert begin(address, "/v1/documents", document(True)).recv(100).startswith(b"HTTP/1.1 200")
    for connection in connections:
        connection.close()


def test_a_body_that_does_not_come() -> None:
    with served(limits=Limits(stall=0.3)) as service, running(service) as address:
        at = urlsplit(address)
        connection = socket.create_connection((at.hostname, at.port), timeout=30)
        head = f"POST /v1/audio/speech HTTP/1.1\r\nhost: {at.netloc}\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: 50\r\n\r\n{{".encode())
        assert told_by(connection).startswith(b"HTTP/1.1 408")  # and then it is closed


@pytest.mark.parametrize("head", [b"", b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n"])
def test_a_head_that_does_not_come(head: bytes) -> None:
    """Uvicorn waits for ever for a request's first line and headers: whoever opened a thousand connections and said
    nothing had the server for himself. One byte now and then does not help."""
    with served(limits=Limits(stall=0.4)) as service, running(service) as address:
        at = urlsplit(address)
        connection = socket.create_connection((at.hostname, at.port), timeout=30)
        began = time.monotonic()
        connection.sendall(head)
        with contextlib.suppress(OSError):
            while time.monotonic() < began + 10:
                connection.sendall(b"x" if head else b"")
                connection.settimeout(0.1)
                with contextlib.suppress(TimeoutError):
                    assert connection.recv(100) == b""
                    break
        assert time.monotonic() < began + 9
        patient = http.client.HTTPConnection(at.hostname or "", at.port, timeout=30)
        for _ in range(3):  # a connection that is used is not left
            patient.request("GET", "/health")
            assert patient.getresponse().read() == b'{"status":"ok"}'
            time.sleep(0.3)


def test_a_body_that_trickles() -> None:
    with served(limits=Limits(stall=30, body=0.5)) as service, running(service) as address:
        at = urlsplit(address)
        connection = socket.create_connection((at.hostname, at.port), timeout=30)
        head = f"POST /v1/audio/speech HTTP/1.1\r\nhost: {at.netloc}\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: 5000\r\n\r\n".encode())
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.02)
        assert told_by(connection).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("said", [b"hello\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\r\n\r\n"])
def test_what_is_no_http_is_told_so_in_the_one_form(said: bytes) -> None:
    with served() as service, running(service) as address:
        at = urlsplit(address)
        connection = socket.create_connection((at.hostname, at.port), timeout=30)
        connection.sendall(said)
        head, _, body = told_by(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert b"x-request-id: req_" in head
        assert json.loads(body)["error"]["code"] == "invalid_http"


def test_more_connections_than_may_be_open() -> None:
    """Uvicorn's own answer had neither the form of an error nor an id; and websockets were let in beyond the limit."""
    with served(limits=Limits(connections=2)) as service, running(service) as address:
        at = urlsplit(address)
        idle = [socket.create_connection((at.hostname, at.port), timeout=30) for _ in range(2)]
        wait_for(lambda: service.connections() == 2)
        connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=30)
        connection.request("GET", "/health")
        answered = connection.getresponse()
        assert (answered.status, answered.headers["retry-after"]) == (503, "1")
        assert json.loads(answered.read())["error"]["code"] == "unavailable"
        idle.pop().close()
        wait_for(lambda: service.connections() < 2)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200


def test_a_large_body_is_refused_before_it_is_held() -> None:
    """By what it says of itself, and, if it says nothing, as soon as too much has come."""
    with served(limits=Limits(upload=1 << 20)) as service, running(service) as address:
        at = urlsplit(address)
        for framing in ("content-length: 900000000000", "transfer-encoding: chunked"):
            connection = socket.create_connection((at.hostname, at.port), timeout=30)
            head = f"POST /v1/audio/speech HTTP/1.1\r\nhost: {at.netloc}\r\ncontent-type: application/json\r\n"
            if framing.startswith("content"):  # who asks first is told at once
                head += "expect: 100-continue\r\n"
            connection.sendall(f"{head}{framing}\r\n\r\n".encode())
            if framing.startswith("transfer"):  # who only sends is listened to for a while, and then told
                for _ in range(40):
                    connection.sendall(b"10000\r\n" + bytes(65_536) + b"\r\n")
                connection.sendall(b"0\r\n\r\n")
            told = told_by(connection, b"request_too_large")
            assert told.startswith(b"HTTP/1.1 413")
            assert b"request_too_large" in told


def test_a_client_that_does_not_read() -> None:
    """What it does not take in for long is not sent any more, and its document is given up."""
    ended = asyncio.Event()

    async def pieces() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield bytes(1000)
        finally:
            ended.set()

    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    sent = []

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 3:
            await never()

    async def main() -> None:
        await asyncio.wait_for(Stream(pieces(), "audio/wav", stall=0.1)({}, never, send), 10)

    asyncio.run(main())
    assert ended.is_set()
    assert len(sent) == 4
    assert not any(message.get("more_body") is False for message in sent)  # nobody takes it for the whole


def test_what_fails_in_the_middle_breaks_the_connection_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound that is cut short is not taken for the whole; events say what happened; the next client is served."""
    with served() as service, running(service) as address:
        codec, decode, calls = service.codec("speech"), service.codec("speech").decode, []

        def fails(rows: Any) -> Any:
            calls.append(rows)
            if len(calls) == 2:
                raise RuntimeError("lost")
            return decode(rows)

        monkeypatch.setattr(codec, "decode", fails)
        body = {"model": NAME, "input": "one", "voice": "alloy", "response_format": "pcm"}
        at = urlsplit(address)
        connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=60)
        connection.request("POST", "/v1/audio/speech", json.dumps(body), {"content-type": "application/json"})
        with pytest.raises(http.client.IncompleteRead):
            connection.getresponse().read()
        calls.clear()
        connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=60)
        sse = json.dumps({**body, "stream_format": "sse"})
        connection.request("POST", "/v1/audio/speech", sse, {"content-type": "application/json"})
        last = connection.getresponse().read().decode().strip().splitlines()[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
        monkeypatch.setattr(codec, "decode", decode)
        connection.request("POST", "/v1/audio/speech", sse, {"content-type": "application/json"})
        assert connection.getresponse().status == 200


def test_an_end_in_order(endless: Any) -> None:
    """Who is being served is served to the end; nobody new is; and who takes too long is left."""
    short = served_model()
    with served(short) as service:
        with running(service, grace=30.0) as address:
            connection = begin(address, "/v1/documents", document(True))
            assert connection.recv(10)
            wait_for(lambda: service.documents == 1)
        assert b"document.done" in told_by(connection)
    with served(endless) as service:
        began = time.monotonic()
        with running(service, grace=0.5) as address:
            connection = begin(address, "/v1/documents", document(True))
            wait_for(lambda: service.documents == 1)
        assert time.monotonic() - began < 15


def test_new_requests_are_told_that_it_ends() -> None:
    with served() as service, client_of(service) as client:
        service.documents = 1  # somebody is still served

        async def end() -> None:
            await service.end(0.1)

        asyncio.run(end())
        found = client.get("/v1/models")
        assert (found.status_code, found.json()["error"]["code"]) == (503, "unavailable")
        service.documents = 0
