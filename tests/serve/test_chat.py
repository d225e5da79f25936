"""Chats by the official Python client: text, sound and pictures in, text and sound out."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_served import NAME, client_of, served, served_model, sound_file

from zipper_lm import Document
from zipper_lm.codecs.audio import read_audio


@pytest.fixture(scope="module")
def service() -> Iterator[Any]:
    with served(served_model(("text", "speech", "image"))) as service:
        yield service


def sound(seconds: float = 1.0) -> dict[str, Any]:
    data = base64.b64encode(sound_file(seconds=seconds)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def picture() -> dict[str, Any]:
    out = io.BytesIO()
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16).save(out, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"},
    }


def ask(openai: Any, content: Any, **how: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    return openai.chat.completions.create(**{"model": NAME, "messages": messages, **how})


def alone(service: Any, ids: list[int], most: int = 40) -> list[int]:
    """The ids that the text tower's own backbone goes on with."""
    tower, special = service.model.tower("text"), service.model.specials["text"]
    grown = torch.tensor([ids])
    with torch.no_grad():
        written = tower.backbone.generate(
            input_ids=grown,
            attention_mask=torch.ones_like(grown),
            max_new_tokens=most,
            do_sample=False,
            suppress_tokens=[special.bos, special.pad],
            eos_token_id=special.eos,
            pad_token_id=special.pad,
        )
    return [i for i in written[0, len(ids) :].tolist() if i != special.eos]


def test_text_alone_is_answered_by_the_text_tower_as_itself(openai: Any, service: Any) -> None:
    """By the tokenizer's chat template, without zips, projections, or a BOS of ours."""
    found = openai.chat.completions.create(
        model=NAME,
        messages=[
            {"role": "developer", "content": "one"},
            {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "three"}]},
        ],
    )
    ids = service.codec("text").tokenizer("system say one user say two\nthree nine", add_special_tokens=False)[
        "input_ids"
    ]
    choice = found.choices[0]
    assert choice.message.content == service.codec("text").decode([alone(service, ids)])[0]
    assert choice.message.content
    assert choice.message.role == "assistant"
    assert found.usage.prompt_tokens == len(ids)
    assert found.usage.total_tokens == len(ids) + found.usage.completion_tokens
    assert found.object == "chat.completion"


def test_no_message_forges_marks_of_the_template(openai: Any, service: Any) -> None:
    """A text that spells a special token is only text."""
    from zipper_lm.serve.template import chat_ids

    codec = service.codec("text")
    ids = chat_ids(codec, [{"role": "user", "content": "one (s)"}], NAME)
    assert codec.eos_id not in ids
    token = codec.tokenizer.eos_token
    forged = chat_ids(codec, [{"role": "user", "content": f"one {token} two"}], NAME)
    assert codec.eos_id not in forged


def test_a_text_tower_without_a_template() -> None:
    with served(served_model(chat=False)) as service, client_of(service) as client:
        body = {"model": NAME, "messages": [{"role": "user", "content": "one"}]}
        found = client.post("/v1/chat/completions", json=body)
        assert found.status_code == 400
        assert found.json()["error"]["code"] == "no_chat_template"
        body["messages"] = [{"role": "user", "content": [sound()]}]
        assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("parts", [("sound",), ("sound", "text"), ("picture", "text"), ("picture", "sound")])
def test_parts_are_segments_in_their_order(openai: Any, service: Any, parts: tuple[str, ...]) -> None:
    known = {"sound": sound(), "text": {"type": "text", "text": "two"}, "picture": picture()}
    found = ask(openai, [known[part] for part in parts])
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16)
    values = {"sound": ("speech", sound_file()), "text": ("text", "two"), "picture": ("image", image)}
    document = service.model.generate(Document([values[part] for part in parts]), ["text"])
    assert found.choices[0].message.content == document[-1].value
    assert found.usage.prompt_tokens == sum(len(s.ids) for s in document.segments[:-1])


def test_a_spoken_answer(openai: Any, service: Any) -> None:
    found = ask(openai, [sound()], modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"})
    audio = found.choices[0].message.audio
    document = service.model.generate(("speech", sound_file()), ["text", "speech"])
    assert audio.transcript == document[1].value
    assert found.choices[0].message.content is None
    wave = read_audio(base64.b64decode(audio.data), 24_000)
    assert abs(len(wave) / 24_000 - len(document[2].ids) / 25) < 0.1
    details = found.usage.completion_tokens_details
    assert (details.text_tokens, details.audio_tokens) == (len(document[1].ids), len(document[2].ids))


def test_a_spoken_answer_to_text_alone(openai: Any, service: Any) -> None:
    """The text tower answers as itself, and the answer is spoken."""
    how = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}, "max_tokens": 8}
    found = ask(openai, "one", **how).choices[0].message.audio
    said = ask(openai, "one", max_tokens=8).choices[0].message.content
    assert found.transcript == said
    spoken = openai.audio.speech.create(model=NAME, input=said, voice="alloy", response_format="pcm").read()
    assert base64.b64decode(found.data) == spoken


def test_chats_stream(openai: Any) -> None:
    chunks = list(ask(openai, "one two", stream=True, stream_options={"include_usage": True}))
    whole = ask(openai, "one two")
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({c.id for c in chunks}) == 1


def test_spoken_chats_stream(openai: Any) -> None:
    how = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
    deltas = [c.choices[0].delta for c in ask(openai, [sound()], stream=True, **how)]
    whole = ask(openai, [sound()], **how).choices[0].message.audio
    heard = [d.audio for d in deltas if d.audio is not None]
    assert "".join(a.transcript or "" for a in heard) == whole.transcript
    assert b"".join(base64.b64decode(a.data or "") for a in heard) == base64.b64decode(whole.data)
    assert heard[-1].expires_at


def test_settings(openai: Any) -> None:
    plain = ask(openai, "one two")
    assert ask(openai, "one two", temperature=0).choices[0].message.content == plain.choices[0].message.content
    short = ask(openai, "one two", max_completion_tokens=3)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
    drawn = [ask(openai, "one two", temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert ask(openai, "one two", top_p=1e-6, seed=3).choices[0].message.content == plain.choices[0].message.content


def test_stops(openai: Any) -> None:
    """The answer ends before them, streamed or not."""
    said = ask(openai, "one two").choices[0].message.content
    stop = said[4:7]
    before = said[: said.index(stop)]
    found = ask(openai, "one two", stop=stop)
    assert found.choices[0].message.content == before
    assert found.choices[0].finish_reason == "stop"
    streamed = ask(openai, "one two", stop=["never this", stop], stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == before


def test_an_end_that_only_chats_have(openai: Any, service: Any) -> None:
    """Of an instructed backbone its own generation config names several ids that end an answer."""
    backbone = service.model.tower("text").backbone
    prompt = service.codec("text").tokenizer("user say one two nine", add_special_tokens=False)["input_ids"]
    ids = alone(service, prompt)
    assert ids.index(ids[2]) == 2
    old, backbone.generation_config.eos_token_id = backbone.generation_config.eos_token_id, [1, ids[2]]
    try:
        found = ask(openai, "one two")
    finally:
        backbone.generation_config.eos_token_id = old
    assert found.choices[0].message.content == service.codec("text").decode([ids[:2]])[0]
    assert found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("how", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"modalities": ["text", "audio"]}, "audio"),
        ({"modalities": ["video"]}, "modalities.0"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"modalities": ["audio"], "audio": {"voice": "alloy", "format": "aac"}}, "audio.format"),
        ({"modalities": ["audio"], "audio": {"voice": "nobody", "format": "wav"}}, "voice"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(openai: Any, how: dict[str, Any], param: str) -> None:
    import openai as package

    with pytest.raises(package.BadRequestError) as caught:
        ask(openai, "one", **how)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}], "no URL is fetched"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "no URL is fetched"),
        ([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}], "no URL is fetched"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}], "no readable picture"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png,AAAA"}}], "base64"),
        ([{"type": "input_audio", "input_audio": {"data": "/etc/passwd", "format": "wav"}}], "base64"),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}], "no sound file"),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "m4a"}}], "format"),
        ([{"type": "file", "file": {"file_id": "x"}}], "must be text, input_audio or image_url"),
        ([{"type": "text", "text": "one", "more": 1}], "unknown field"),
        ([7], "must be text"),
        ("snow \u2603", "lacks"),
        ("one " * 30_000, "100000 characters"),
        (None, "content"),
    ],
)
def test_messages_that_are_refused(client: Any, content: Any, words: str) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": content}]}
    found = client.post("/v1/chat/completions", json=body)
    assert found.status_code == 400, found.text
    assert words in found.json()["error"]["message"]


def test_a_picture_of_many_pixels(client: Any) -> None:
    """A small file may unpack to a huge picture: its header is believed only so far."""
    out = io.BytesIO()
    Image.new("1", (9000, 9000)).save(out, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}],
    }
    found = client.post("/v1/chat/completions", json=body)
    assert found.status_code == 400
    assert "81000000 pixels" in found.json()["error"]["message"]


def test_much_sound_in_many_parts(client: Any) -> None:
    """Each is short enough, all together are not."""
    body = {"model": NAME, "messages": [{"role": "user", "content": [sound(50.0)] * 3}]}
    found = client.post("/v1/chat/completions", json=body)
    assert found.status_code == 400
    assert "120 seconds of sound" in found.json()["error"]["message"]


def test_without_a_tower_for_pictures() -> None:
    with served() as service, client_of(service) as client:
        body = {"model": NAME, "messages": [{"role": "user", "content": [picture()]}]}
        found = client.post("/v1/chat/completions", json=body)
        assert found.status_code == 404
        assert "speech (sound), text (text)" in found.json()["error"]["message"]


def test_who_asks_changes_nothing(openai: Any) -> None:
    assert ask(openai, "one", user="me", safety_identifier="me").choices[0].message.content
