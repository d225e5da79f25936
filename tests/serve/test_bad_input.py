"""What clients should not send: each is refused by name, and the next request is served."""

import json
import struct
from typing import Any

import numpy as np
import pytest
from tiny_served import NAME, client_of, served, served_model, sound_file, voice

SOUND = sound_file()


def post(client: Any, data: bytes = SOUND, **fields: Any) -> Any:
    return client.post("/v1/audio/transcriptions", files={"file": ("a", data)}, data={"model": NAME, **fields})


def say(client: Any, **fields: Any) -> Any:
    return client.post("/v1/audio/speech", json={"model": NAME, "input": "one", "voice": "alloy", **fields})


def refused(response: Any, status: int, *words: str) -> dict[str, Any]:
    """The error of an answer, in the one form there is."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    for word in words:
        assert word in error["message"]
    return dict(error)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ("empty",)),
        (b"hello, this is no sound at all", ("no sound file",)),
        (b"\x00\x00\x00\x20ftypM4A " + bytes(40), ("m4a",)),
        (b"\x1a\x45\xdf\xa3" + bytes(40), ("webm",)),
        (SOUND[: len(SOUND) // 2], ("cut off",)),
        (SOUND[:40], ()),
        (b"RIFF\xff\xff\xff\xffWAVE", ()),
        (b"fLaC" + bytes(100), ()),
        (b"OggS" + bytes(100), ()),
        (b"\xff\xfb" + bytes(100), ()),
        (sound_file(seconds=2.0)[:44] + np.float32("nan").tobytes(), ()),
    ],
)
def test_sounds_that_are_none(client: Any, data: bytes, words: tuple[str, ...]) -> None:
    error = refused(post(client, data), 400, *words)
    assert (error["param"], " at 0x" in error["message"]) == ("file", False)  # where something is, is nobody's business
    assert post(client).status_code == 200


def test_a_sound_that_is_too_long(client: Any) -> None:
    assert "120" in refused(post(client, sound_file("FLAC", 121.0, rate=8_000)), 400, "file", "lasts")["message"]


def test_a_small_file_of_many_samples() -> None:
    """Silence packs well: what a header promises is refused before it is unpacked."""
    import io

    import soundfile

    out = io.BytesIO()
    soundfile.write(out, np.zeros((1_000_000, 8), dtype=np.int16), 192_000, format="FLAC")
    from zipper_lm.serve.limits import Limits

    with served(limits=Limits(samples=1 << 20)) as service, client_of(service) as client:
        refused(post(client, out.getvalue()), 400, "more than the limit of 1048576 samples")


def test_an_upload_that_is_too_large() -> None:
    from zipper_lm.serve.limits import Limits

    with served(limits=Limits(upload=100_000)) as service, client_of(service) as client:
        refused(post(client, bytes(300_000)), 413)
        refused(post(client, bytes(120_000)), 413, "120000", "100000")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "gpt-4o"}, "model"),
        ({"response_format": "srt"}, "response_format"),
        ({"response_format": "vtt"}, "response_format"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"temperature": "7"}, "temperature"),
        ({"language": "../../etc"}, "language"),
        ({"stream": "perhaps"}, "stream"),
        ({"prompt": "one\u2603"}, "prompt"),
        ({"stream": "true", "response_format": "verbose_json"}, "response_format"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"include[]": "logprobs"}, "include"),
        ({"chunking_strategy": "auto"}, "chunking_strategy"),
        ({"nonsense": "1"}, "nonsense"),
    ],
)
def test_fields_of_a_transcription(client: Any, fields: dict[str, str], param: str) -> None:
    assert refused(post(client, **fields), 404 if param == "model" else 400)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "tts-1"}, "model"),
        ({"model": 7}, "model"),
        ({"input": ""}, "input"),
        ({"input": 3}, "input"),
        ({"input": "one " * 1025}, "input"),
        ({"input": "snow \u2603"}, "input"),
        ({"voice": "nobody"}, "voice"),
        ({"voice": {"id": "nobody"}}, "voice"),
        ({"response_format": "aac"}, "response_format"),
        ({"speed": 2}, "speed"),
        ({"speed": "fast"}, "speed"),
        ({"stream_format": "rtp"}, "stream_format"),
        ({"instructions": "whisper"}, "instructions"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_fields_of_speech(client: Any, fields: dict[str, Any], param: str) -> None:
    error = refused(say(client, **fields), 404 if fields.get("model") == "tts-1" else 400)
    assert error["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"voice": 3}, "voice"),
        ({"speed": True}, "speed"),
        ({"speed": None}, "speed"),
        ({"messages": [{"content": "one"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"stop": 3}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"n": True}, "n"),
        ({"max_tokens": 10**30}, "max_tokens"),
    ],
)
def test_a_field_is_called_what_its_client_calls_it(client: Any, fields: dict[str, Any], param: str) -> None:
    """Of a field that may be of two kinds the first kind was told, too: ``speed.int``. And `n` could be `true`."""
    chat = {"model": NAME, "messages": [{"role": "user", "content": "one"}], **fields}
    response = say(client, **fields) if param in ("voice", "speed") else client.post("/v1/chat/completions", json=chat)
    error = refused(response, 400, param)
    assert error["param"] == param


@pytest.mark.parametrize("body", ['{"\\ud800": 1}', '{"input": "\\uDFFF"}', '{"instructions": ["\\ud83d"]}'])
def test_half_a_character(client: Any, body: str) -> None:
    """JSON can spell one, but no answer can say it: the refusal failed, and was told as the server's own fault."""
    whole = json.dumps({"model": NAME, "input": "one", "voice": "alloy"})[:-1] + "," + body[1:]
    for said in (whole.encode(), whole.encode().replace(b"\\ud800", b"\xed\xa0\x80").replace(b"one", b"\xff")):
        refused(
            client.post("/v1/audio/speech", content=said, headers={"content-type": "application/json"}), 400, "JSON"
        )


def test_whole_characters_may_be_spelled_in_halves(client: Any) -> None:
    said = json.dumps({"model": NAME, "input": "\U0001f600", "voice": "alloy"})  # two escapes
    error = refused(client.post("/v1/audio/speech", content=said, headers={"content-type": "application/json"}), 400)
    assert error["message"].startswith("input: the tokenizer lacks ['")


def test_a_form_in_another_charset(client: Any) -> None:
    """Python decodes by names that no client means; unicode_escape makes half characters, punycode takes for ever."""
    body = (
        b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\n\\ud800\r\n'
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--x--\r\n'
    )
    form = {"content-type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    refused(client.post("/v1/audio/transcriptions", content=body, headers=form), 415, "unicode_escape")
    form = {"content-type": "multipart/form-data; boundary=x; charset=UTF-8"}
    refused(client.post("/v1/audio/transcriptions", content=body, headers=form), 404, "ud800")


def test_more_tokens_than_one_may_have_read() -> None:
    """Characters were counted, and ids that came as ids: a text of many tokens held up everybody for a minute."""
    from zipper_lm.serve.limits import Limits

    with served(limits=Limits(ids=20)) as service, client_of(service) as client:
        assert say(client, input="one two").status_code == 200
        assert refused(say(client, input="one two " * 30), 400, "20 tokens")["param"] == "input"
        assert refused(post(client), 400, "20 tokens")["param"] == "file"  # a second of sound is 25 and more
        chat = {"model": NAME, "messages": [{"role": "user", "content": "one " * 60}]}
        assert refused(client.post("/v1/chat/completions", json=chat), 400, "20 tokens")["param"] == "messages"


def test_defaults_that_are_spelled_out_are_no_reason(client: Any) -> None:
    assert say(client, speed=1.0, instructions=None).status_code == 200
    assert say(client, speed=1, instructions="").status_code == 200


def test_bodies_of_another_kind(client: Any) -> None:
    route = "/v1/audio/speech"
    refused(client.post(route, content=b"{", headers={"content-type": "application/json"}), 400, "JSON")
    refused(client.post(route, content=b"[]", headers={"content-type": "application/json"}), 400, "object")
    deep = b"[" * 200_000
    refused(client.post(route, content=deep, headers={"content-type": "application/json"}), 400, "JSON")
    refused(client.post(route, content=b"a=b", headers={"content-type": "text/plain"}), 415, "application/json")
    refused(client.post(route, json={"model": NAME}), 400, "missing")
    refused(client.post("/v1/audio/transcriptions", json={"model": NAME}), 415, "multipart/form-data")
    refused(client.post("/v1/audio/transcriptions", data={"model": NAME}, files={"other": b"x"}), 400, "file")
    form = {"content-type": "multipart/form-data; boundary=x"}
    refused(client.post("/v1/audio/transcriptions", content=b"--y\r\nrubbish", headers=form), 400)
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    refused(client.post(route, content=b"x", headers=packed), 415, "content-encoding")


def test_routes_and_methods_that_are_not_there(client: Any) -> None:
    refused(client.get("/v1/nothing"), 404, "/v1/nothing")
    refused(client.get("/v1/audio/speech"), 405, "GET")
    refused(client.get("/v1/models/other"), 404, "other")
    refused(client.get("/docs"), 404)


def test_ids_of_requests(client: Any) -> None:
    """A harmless one comes back, also twice; one that could end a header does not."""
    for _ in range(2):
        assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 200, "a\tb", 'a"b', "é".encode("latin-1")):
        found = client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert found.startswith("req_")
    found = say(client, voice="a\r\nset-cookie: b")
    assert "set-cookie" not in found.headers


def test_a_model_without_the_modality() -> None:
    """404, with what it has."""
    with served(served_model(("text", "image"))) as service, client_of(service) as client:
        for response in (post(client), say(client)):
            error = refused(response, 404, "image (picture)", "text (text)")
            assert error["code"] == "modality_not_found"


def test_a_model_without_the_direction() -> None:
    from zipper_lm import ZipSpec

    model = served_model(zips=[ZipSpec(reader="text", source="speech", layers=2)])
    with served(model) as service, client_of(service) as client:
        assert post(client).status_code == 200
        error = refused(say(client), 404, "text from speech")
        assert error["code"] == "direction_not_found"


@pytest.mark.parametrize("language", ["en", "EN", "en-GB"])
def test_another_language_than_the_models(language: str) -> None:
    """`--language EN` refused everything."""
    with served(language=language) as service, client_of(service) as client:
        assert post(client, language="en-US").status_code == 200
        refused(post(client, language="de"), 400, language)


def test_what_is_no_language() -> None:
    from zipper_lm.serve.service import Service

    with pytest.raises(ValueError, match="language must be a code such as en, got 'english'"):
        Service(NAME, language="english")


def test_a_header_that_lies_about_its_length(client: Any) -> None:
    """A WAV file that was written to a pipe is read to its end."""
    samples = (voice(1.0) * 32767).astype("<i2").tobytes()
    form = (b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16)
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 2**32 - 1, b"WAVE", *form, b"data", 2**32 - 1)
    assert post(client, head + samples).json()["text"] == post(client).json()["text"]


def test_errors_are_json_whatever_is_asked(client: Any) -> None:
    assert json.loads(client.get("/nothing").text)["error"]["type"] == "invalid_request_error"
