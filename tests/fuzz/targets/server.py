"""Requests to `zipper serve`: every route, JSON and forms, with what clients should not send."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fuzz.grammar import NUMBERS, TEXTS, as_json, changed, damaged, hostile
from fuzz.target import Target
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from tiny_served import NAME, client_of, served, served_model, sound_file

from zipper_lm.serve.limits import Limits

SOUND = base64.b64encode(sound_file(seconds=0.1)).decode()
OPUS = base64.b64encode(sound_file("OGG", 0.1)).decode()
_PIXELS = "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAAAAACMmsGiAAAAEElEQVR4nGNkYGBgYIBgZDYAAjAAFKBk1KUAAAAASUVORK5CYII="
PICTURE = f"data:image/png;base64,{_PIXELS}"
BODIES: dict[str, list[Any]] = {
    "/v1/audio/speech": [
        {"model": NAME, "input": "one", "voice": "alloy"},
        {
            "model": NAME,
            "input": "one",
            "voice": {"id": "alloy"},
            "response_format": "wav",
            "speed": 1.0,
            "stream_format": "sse",
        },
    ],
    "/v1/chat/completions": [
        {"model": NAME, "messages": [{"role": "user", "content": "one"}], "max_tokens": 4},
        {
            "model": NAME,
            "messages": [
                {"role": "system", "content": "two"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "one"},
                        {"type": "input_audio", "input_audio": {"data": SOUND, "format": "wav"}},
                    ],
                },
            ],
            "modalities": ["text", "audio"],
            "audio": {"format": "wav", "voice": "alloy"},
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "top_p": 0.9,
            "stop": ["two"],
            "seed": 3,
        },
        {
            "model": NAME,
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}]}],
        },
    ],
    "/v1/documents": [
        {"model": NAME, "document": [{"modality": "text", "text": "one"}], "schedule": ["speech", "text"]},
        {
            "model": NAME,
            "document": [
                {"modality": "speech", "audio": SOUND},
                {"modality": "image", "image": PICTURE},
                {"modality": "text", "ids": [4, 5]},
            ],
            "schedule": ["text", {"modality": "text", "text": "two"}, "image"],
            "settings": {"text": {"do_sample": True, "temperature": 0.7, "top_k": 5, "seed": 3, "max_new_tokens": 3}},
            "max_segments": 4,
            "best_of": 2,
            "audio_format": "flac",
            "stream": True,
        },
        {"model": NAME, "document": [], "schedule": "auto"},
    ],
    "/v1/audio/transcriptions": [
        {"model": NAME, "file": SOUND, "response_format": "verbose_json", "language": "en", "temperature": "0.2"},
        {"model": NAME, "file": OPUS, "prompt": "one", "stream": "true"},
    ],
}
REST = (
    "/",
    "/health",
    "/metrics",
    "/openapi.json",
    "/v1/models",
    f"/v1/models/{NAME}",
    "/page/main.js",
    "/v1/realtime",
)
WORDS = [
    *(
        SOUND,
        SOUND[:40],
        OPUS,
        PICTURE,
        "data:image/png;base64,",
        "data:text/html;base64,aGk=",
        NAME,
        "text",
        "speech",
        "image",
    ),
    *(
        "audio",
        "auto",
        "wav",
        "mp3",
        "opus",
        "pcm",
        "sse",
        "user",
        "assistant",
        "system",
        "tool",
        "developer",
        "file",
        "ids",
    ),
    *(
        "max_tokens",
        "max_completion_tokens",
        "n",
        "logprobs",
        "tools",
        "stop",
        "seed",
        "max_new_tokens",
        "num_beams",
        "guidance_scale",
    ),
    *(
        "num_return_sequences",
        "suppress_tokens",
        "stop_strings",
        "repetition_penalty",
        "min_new_tokens",
        "do_sample",
        "top_k",
    ),
    *("input_audio", "image_url", "url", "content", "role", "model"),
]
HEADERS = (
    *(
        "authorization",
        "content-type",
        "content-length",
        "content-encoding",
        "host",
        "origin",
        "x-request-id",
        "expect",
    ),
    *("transfer-encoding", "cookie", "range", "accept", "sec-websocket-protocol", "x-forwarded-for"),
)


def make() -> Target:
    """Of requests as clients send them."""
    return Target(name="server", run=run, share=25, inputs=_inputs(), around=around)


_clients: list[Any] = []


@contextmanager
def around() -> Iterator[None]:
    """A model of three towers is served, with a few tokens a segment."""
    limits = Limits(tokens=8, upload=1 << 20, seconds=5.0, samples=1 << 20, pixels=1 << 16)
    model = served_model(("text", "speech", "image"), tokens=4)
    with served(model, limits=limits) as service, client_of(service) as client:
        _clients.append(client)
        try:
            client.get("/health")
            yield
        finally:
            _clients.remove(client)


def client() -> Any:
    """The client of the server around."""
    return _clients[-1]


def run(data: bytes, folder: Path) -> None:
    """A request in JSON: method, path, headers, and a body, of which `text` is as it is."""
    asked = json.loads(data)
    headers = {str(k): str(v) for k, v in asked["headers"].items()}
    if asked["path"] == "/v1/audio/transcriptions" and isinstance(asked.get("body"), dict):
        body: dict[str, Any] = _form(asked["body"])
    else:
        content = asked["text"].encode("utf-8", "surrogatepass") if "text" in asked else as_json(asked["body"])
        body = {"content": content} if asked["method"] != "GET" else {}
        headers = {"content-type": "application/json", **headers}
    answer = client().request(asked["method"], asked["path"], headers=_plain(headers), **body)
    check(answer)


def check(answer: Any) -> None:
    """An answer, or an error in the one form there is. What is streamed may end in an error of that form, too."""
    if answer.status_code >= 500:
        raise AssertionError(f"{answer.status_code}: {answer.text[:300]}")
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        error = answer.json()["error"]
        if sorted(error) != ["code", "message", "param", "type"] or not error["message"]:
            raise AssertionError(f"{answer.status_code}: {answer.text[:300]}")
    if '"internal_error"' in answer.text or '"server_error"' in answer.text:
        raise AssertionError(answer.text[-300:])
    if answer.status_code >= 400:
        raise ValueError(f"{answer.status_code}: {answer.text[:200]}")


def _plain(headers: dict[str, str]) -> dict[str, str]:
    """As far as a client can send them at all."""
    return {
        k: "".join(c for c in v if 31 < ord(c) < 127)[:4000]
        for k, v in headers.items()
        if k.isascii() and k.isprintable() and k
    }


def _form(fields: dict[str, Any]) -> dict[str, Any]:
    given = dict(fields)
    file = given.pop("file", None)
    plain = {
        str(k).encode("utf-8", "replace").decode(): str(v).encode("utf-8", "replace").decode() for k, v in given.items()
    }
    if file is None:
        return {"data": plain, "files": {"other": ("a", b"x")}}
    try:
        content = base64.b64decode(str(file))
    except ValueError:
        content = str(file).encode("utf-8", "replace")
    return {"data": plain, "files": {"file": ("a", content)}}


@st.composite
def _inputs(draw: DrawFn) -> bytes:
    path = draw(st.sampled_from([*BODIES, *BODIES, *BODIES, "rest"]))
    asked: dict[str, Any] = {"method": "POST", "path": path, "headers": {}}
    if path == "rest":
        asked["method"] = draw(
            st.sampled_from(["GET", "GET", "GET", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH", "POST"])
        )
        asked["path"] = draw(
            st.sampled_from([*REST, "/v1/models/..%2f..%2fx", "/page/../../x", "/page/%2e%2e/x", "/v1/" + "a" * 5000])
        )
        asked["body"] = draw(hostile(WORDS))
    elif draw(st.integers(0, 9)):
        asked["body"] = draw(changed(BODIES[path], WORDS, 2))
    else:
        asked["text"] = draw(damaged(changed(BODIES[path], WORDS, 2).map(as_json))).decode("utf-8", "replace")
    if not draw(st.integers(0, 6)):
        values = st.one_of(st.sampled_from(TEXTS), st.sampled_from(NUMBERS[:20]).map(str), st.just("text/plain"))
        asked["headers"] = {draw(st.sampled_from(HEADERS)): draw(values)}
    return as_json(asked)
