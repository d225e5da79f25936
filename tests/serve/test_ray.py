"""Two replicas on this machine, by examples/serve_ray.py as it is run. Run by `make test-ray`."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_served import NAME, served_model, sound_file, voice

from zipper_lm import load
from zipper_lm.serve.forms import encoded

pytest.importorskip("ray.serve", reason="needs the extra `ray`")
openai = pytest.importorskip("openai", reason="needs the client `openai`")

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_ray.py"
PATIENCE = 120.0  # seconds, for a machine that does other things, too


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray") / NAME
    served_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def process(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[psutil.Process, str]]:
    """The example, and its address."""
    port, told = free_port(), tmp_path_factory.mktemp("told") / "log"
    command = [sys.executable, str(EXAMPLE), str(folder), "--name", NAME, "--replicas", "2", "--port", str(port)]
    command += ["--slots", "4", "--cpus", "0.5"]
    # Of its own: no cluster that runs here is joined, and Ray's token does not lie among the user's files.
    env = os.environ | {"RAY_ADDRESS": "local", "HOME": str(told.parent)}
    with told.open("wb") as log:
        started = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    example = psutil.Process(started.pid)
    family = [example]
    try:
        until = time.monotonic() + PATIENCE
        while b"is ready at" not in told.read_bytes():
            assert started.poll() is None, told.read_text()
            assert time.monotonic() < until, told.read_text()
            time.sleep(0.2)
        yield example, f"http://127.0.0.1:{port}"
        family += example.children(recursive=True)
        started.send_signal(signal.SIGTERM)
        assert started.wait(PATIENCE) == 0, told.read_text()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += example.children(recursive=True)
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        started.wait()


@pytest.fixture(scope="module")
def client(process: Any) -> Any:
    return openai.OpenAI(base_url=f"{process[1]}/v1", api_key="none", timeout=60, max_retries=5)


def ask(client: Any, seed: int) -> tuple[str, str]:
    """A transcript, and the name of the replica that wrote it."""
    file = ("a.wav", sound_file(seed=seed))
    found = client.audio.transcriptions.with_raw_response.create(model=NAME, file=file)
    return found.parse().text, found.headers["x-zipper-replica"]


def ask_many(client: Any, count: int) -> tuple[list[str], set[str]]:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: ask(client, seed % 4), range(count)))
    return [text for text, _ in found], {replica for _, replica in found}


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[str]:
    """What the model writes of each sound, when nothing serves it."""
    model: Any = load(folder)
    return [model.generate(("speech", sound_file(seed=seed)), ["text"])[-1].value for seed in range(4)]


def test_both_replicas_answer_as_the_model_alone(client: Any, alone: list[str]) -> None:
    texts, replicas = ask_many(client, 24)
    assert texts == alone * 6
    assert len(set(alone)) > 1
    assert len(replicas) == 2


def test_an_answer_streams(client: Any, alone: list[str]) -> None:
    events = list(client.audio.transcriptions.create(model=NAME, file=("a.wav", sound_file(seed=1)), stream=True))
    assert len(events) > 5
    assert "".join(e.delta for e in events[:-1]) == events[-1].text == alone[1]


def test_a_refusal_is_the_applications(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as told:
        client.audio.transcriptions.create(model="other", file=("a.wav", sound_file()))
    assert told.value.code == "model_not_found"


def test_a_conversation_stays_with_its_replica(client: Any, alone: list[str]) -> None:
    pytest.importorskip("websockets")
    with client.realtime.connect(model=NAME) as talk:
        assert talk.recv().type == "session.created"
        talk.input_audio_buffer.append(audio=base64.b64encode(encoded(voice(1.0), "pcm")).decode())
        talk.input_audio_buffer.commit()
        talk.response.create()
        kinds = []
        while "response.done" not in kinds:
            kinds.append(talk.recv().type)
    assert "response.output_audio.delta" in kinds


def test_a_client_that_goes_away_is_not_written_for(client: Any, process: Any) -> None:
    """Ray's proxy stands between, and tells the replica."""
    given = {"modality": "text", "text": "one"}
    many = {"text": {"min_new_tokens": 1500, "max_new_tokens": 1500}}
    body = {"model": NAME, "document": [given], "schedule": "text", "settings": many, "stream": True}
    kind = {"content-type": "application/json"}
    request = urllib.request.Request(f"{process[1]}/v1/documents", json.dumps(body).encode(), kind)
    with urllib.request.urlopen(request, timeout=60) as answer:
        replica = answer.headers["x-zipper-replica"]
        assert len(answer.headers.get_all("x-request-id")) == 1  # Ray's proxy has ids, too
        assert answer.read(10)
    until, page = time.monotonic() + PATIENCE, ""
    while "zipper_cancelled_total 1.0" not in page or "zipper_documents 0.0" not in page:
        assert time.monotonic() < until, page
        with urllib.request.urlopen(f"{process[1]}/metrics", timeout=60) as found:
            page = found.read().decode() if found.headers["x-zipper-replica"] == replica else page
        time.sleep(0.1)


def test_requests_go_on_when_a_replica_is_killed(client: Any, process: Any, alone: list[str]) -> None:
    """Killed as by the kernel for memory: nothing is said to anybody. Another takes its place."""
    before = ask_many(client, 24)[1]
    replicas = [p for p in process[0].children(recursive=True) if " ".join(p.cmdline()).startswith("ray::ServeReplica")]
    assert len(replicas) == 2
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(ask_many, client, 24)
        replicas[0].send_signal(signal.SIGKILL)
        assert going.result()[0] == alone * 6
    until, seen = time.monotonic() + PATIENCE, set()
    while len(seen) < 2 or seen == before:
        assert time.monotonic() < until
        time.sleep(1)
        texts, seen = ask_many(client, 12)
        assert texts == alone * 3
    assert len(seen & before) == 1
