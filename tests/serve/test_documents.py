"""Any document, any schedule: what `/v1/documents` writes is what the model writes."""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_served import NAME, client_of, served, served_model, sound_file

from zipper_lm import Document, Segment
from zipper_lm.codecs.audio import read_audio

SOUND = base64.b64encode(sound_file()).decode()


@pytest.fixture(scope="module")
def service() -> Iterator[Any]:
    with served(served_model(("text", "speech", "image"))) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Any) -> Iterator[Any]:
    with client_of(service) as client:
        yield client


def write(client: Any, **fields: Any) -> Any:
    given = {"model": NAME, "document": [{"modality": "speech", "audio": SOUND}], "schedule": "text"}
    return client.post("/v1/documents", json={**given, **fields})


def events_of(response: Any) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line]


def ids_of(document: Any) -> list[tuple[str, list[int]]]:
    return [(s.modality, list(s.ids)) for s in document]


def test_all_modalities(client: Any, service: Any) -> None:
    """Given in between, too; each value is what its ids mean."""
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4), 200, dtype=np.uint8)).save(out, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    given = [{"modality": "speech", "audio": SOUND}, {"modality": "image", "image": url}]
    schedule = ["text", {"modality": "text", "text": "one"}, "speech", "image"]
    found = write(client, document=given, schedule=schedule).json()
    document = service.model.generate(
        [[("speech", sound_file()), ("image", Image.open(out))]], ["text", Segment("text", "one"), "speech", "image"]
    )[0]
    told = found["segments"]
    assert [(s["modality"], s["written"]) for s in told] == [
        ("speech", False),
        ("image", False),
        ("text", True),
        ("text", False),
        ("speech", True),
        ("image", True),
    ]
    assert [s["tokens"] for s in told] == [len(s.ids) for s in document]
    assert [s["ids"] for s in told if s["written"]] == [list(document[n].ids) for n in (2, 4, 5)]
    assert told[2]["text"] == document[2].value
    wave = read_audio(base64.b64decode(told[4]["audio"]["data"]))
    assert np.abs(wave[:1000] - document[4].value[:1000]).max() < 0.05
    picture = Image.open(io.BytesIO(base64.b64decode(told[5]["image"].split(",")[1])))
    assert np.array_equal(np.asarray(picture), np.asarray(document[5].value))
    wrote = sum(len(document[n].ids) for n in (2, 4, 5))
    assert found["usage"]["output_tokens"] == wrote


def test_ids_stand_for_a_value(client: Any, service: Any) -> None:
    found = write(client, document=[{"modality": "speech", "ids": [5, 6, 7]}]).json()
    document = service.model.generate([Document([Segment("speech", ids=[5, 6, 7])])], ["text"])[0]
    assert found["segments"][1]["ids"] == list(document[1].ids)


def test_the_model_says_who_writes(client: Any, service: Any) -> None:
    found = write(client, schedule="auto", max_segments=3).json()
    document = service.model.generate([Document([("speech", sound_file())])], "auto", max_segments=3)[0]
    assert [(s["modality"], s.get("ids")) for s in found["segments"][1:]] == ids_of(document)[1:]


def test_best_of_n(client: Any, service: Any) -> None:
    found = write(client, best_of=3, settings={"text": {"seed": 5}}).json()["segments"][1]
    settings = {"text": {"do_sample": True, "num_return_sequences": 3, "seed": 5, "max_new_tokens": 40}}
    best = service.model.generate([Document([("speech", sound_file())])], ["text"], settings=settings)[0][1]
    assert found["ids"] == list(best.ids)
    assert found["log_probability"] == pytest.approx(best.score, abs=1e-2)


def test_settings(client: Any, service: Any) -> None:
    how = {"max_new_tokens": 7, "do_sample": True, "temperature": 1.5, "seed": 3, "guidance_scale": 1.5}
    found = write(client, settings={"text": how}).json()["segments"][1]
    said = service.model.generate([Document([("speech", sound_file())])], ["text"], settings={"text": how})[0][1]
    assert found["ids"] == list(said.ids)


def test_it_streams_by_segment_and_token(client: Any) -> None:
    how = {"schedule": ["text", "speech", "image"], "audio_format": "pcm"}
    events, whole = events_of(write(client, **how, stream=True)), write(client, **how).json()["segments"]
    begun = [e["modality"] for e in events if e["type"] == "segment.started"]
    assert begun == ["text", "speech", "image"]
    for number in (1, 2, 3):
        assert [e["id"] for e in events if e["type"] == "token" and e["segment"] == number] == whole[number]["ids"]
    text = [e for e in events if e.get("segment") == 1]
    done = text[-1]
    assert done["type"] == "segment.done"
    assert "".join(e["text"] for e in text if e["type"] == "token") + done["rest"] == done["text"] == whole[1]["text"]
    sound = b"".join(base64.b64decode(e["audio"]) for e in events if e["type"] == "audio.delta")
    assert abs(len(sound) / 48_000 - whole[2]["tokens"] / 25) < 0.1
    assert events[-1]["type"] == "document.done"
    assert events[-1]["document"]["segments"][3]["image"] == whole[3]["image"]


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "other"}, 404, "no model"),
        ({"document": "one"}, 400, "document"),
        ({"document": [{"modality": "text"}]}, 400, "text is given as text or ids"),
        ({"document": [{"modality": "text", "text": "one", "ids": [5]}]}, 400, "text is given as text or ids"),
        ({"document": [{"modality": "speech", "text": "/etc/passwd"}]}, 400, "speech is given as audio or ids"),
        ({"document": [{"modality": "speech", "audio": "file:///etc/passwd"}]}, 400, "base64"),
        ({"document": [{"modality": "image", "image": "http://example.com/a.png"}]}, 400, "no URL is fetched"),
        ({"document": [{"modality": "dna", "text": "ACGT"}]}, 404, "no modality 'dna'"),
        ({"document": [{"modality": "text", "ids": [99_999]}]}, 400, "99999"),
        ({"document": [{"modality": "text", "ids": [-1]}]}, 400, "-1"),
        ({"document": [{"modality": "text", "ids": ["one"]}]}, 400, "ids"),
        ({"document": [{"modality": "text", "ids": [5] * 17_000}]}, 400, "16384 token ids"),
        ({"document": [{"modality": "text", "text": "one"}] * 65}, 400, "64 segments"),
        ({"document": [{"modality": "text", "text": "snow \u2603"}]}, 400, "lacks"),
        ({"document": [7]}, 400, "must be an object"),
        ({"schedule": "dna"}, 404, "dna"),
        ({"schedule": []}, 400, "names no modality"),
        ({"schedule": [{"modality": "text", "text": "one"}]}, 400, "names no modality"),
        ({"schedule": ["text"] * 65}, 400, "64 segments"),
        ({"schedule": 7}, 400, "schedule"),
        ({"best_of": 0}, 400, "best_of"),
        ({"best_of": 5}, 400, "slots=4"),
        ({"settings": {"dna": {}}}, 400, "dna"),
        ({"settings": {"text": {"num_beams": 1000}}}, 400, "num_beams is not followed here"),
        ({"settings": {"text": {"max_new_tokens": 1_000_000}}}, 400, "the limit of 2048"),
        ({"settings": {"text": {"max_new_tokens": "many"}}}, 400, "max_new_tokens"),
        ({"settings": {"text": {"temperature": 0.0, "do_sample": True}}}, 400, "temperature"),
        ({"nonsense": 1}, 400, "unknown field"),
    ],
)
def test_what_is_refused(client: Any, fields: dict[str, Any], status: int, words: str) -> None:
    found = write(client, **fields)
    assert found.status_code == status, found.text
    assert words in found.json()["error"]["message"]
    assert write(client).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"document": [{"modality": "text", "text": "one"}, {"modality": "text", "text": "\u2603"}]},
            "document.1.text",
        ),
        ({"schedule": ["text", {"modality": "text", "text": "\u2603"}]}, "schedule.1.text"),
        ({"document": [{"modality": "text", "ids": [-1]}]}, "document.0.ids"),
        ({"document": [{"modality": "text", "text": "one"}] * 64, "schedule": "auto"}, "document"),
        ({"settings": {"text": {"top_k": -1, "do_sample": True}}}, "settings"),
        ({"settings": {"text": {"stop_strings": ["one"] * 5}}}, "settings.text.stop_strings"),
        ({"settings": {"text": {"stop_strings": "one" * 1000}}}, "settings.text.stop_strings"),
        ({"settings": {"text": {"stop_strings": {"one": 1}}}}, "settings.text.stop_strings"),
        ({"settings": {"text": {"suppress_tokens": [5] * 17_000}}}, "settings.text.suppress_tokens"),
        ({"settings": {"text": {"max_new_tokens": 4000}}}, "settings.text.max_new_tokens"),
        ({"settings": {"text": {"num_return_sequences": 3}}, "best_of": 2}, "settings.text.num_return_sequences"),
        ({"settings": {"text": {"temperature": 0.5}}}, "settings.text.temperature"),
        ({"settings": {"text": {"do_sample": False}}, "best_of": 2}, "settings.text.do_sample"),
    ],
)
def test_what_is_refused_is_named(client: Any, fields: dict[str, Any], param: str) -> None:
    """Whatever was wrong with a segment or a setting was said to be wrong with ``document``; `best_of` took the place
    of other settings without a word; and strings by the million were searched for at each token of everybody."""
    found = write(client, **fields)
    assert (found.status_code, found.json()["error"]["param"]) == (400, param), found.text


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1e308, "do_sample": True},
        {"temperature": 1e-300, "do_sample": True},
        {"top_k": 10**30, "do_sample": True},
        {"repetition_penalty": 1e300},
        {"guidance_scale": -1e300},
        {"min_new_tokens": 10**30},
        {"max_new_tokens": 10**30},
        {"suppress_tokens": [10**30]},
        {"seed": 10**30, "do_sample": True},
    ],
)
def test_no_number_ends_the_engine(client: Any, service: Any, settings: dict[str, Any]) -> None:
    """A temperature of 1e308 did, for everybody: it does not fit a tensor, and the document had no row yet."""
    assert write(client, settings={"text": settings}).status_code in (200, 400)
    assert service.state == "ok"
    assert write(client).status_code == 200
