"""`zipper serve`: what it refuses to begin with, and a server's life from its first line to its end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_served import served_model, sound_file
from typer.testing import CliRunner

from zipper_lm.cli import app
from zipper_lm.cli.serve import _name, _source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "digits" / "model"
    served_model().save_pretrained(folder, bundle_towers=True, card=False)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a MODEL, or --demo"),
        (["--demo"], "zipper demo"),
        (["{model}", "--demo"], "name a MODEL, or --demo"),
        (["no/such/folder"], "no such folder"),
        (["{model}", "--host", "0.0.0.0"], "--api-key-file is needed"),
        (["{model}", "--host", "::"], "--api-key-file is needed"),
        (["{model}", "--api-key", "a b"], "without spaces"),
        (["{model}", "--api-key", ""], "not empty"),
        (["{model}", "--api-key-file", "{empty}"], "not empty"),
        (["{model}", "--api-key-file", "nowhere"], "nowhere"),
        (["{model}", "--language", "english"], "language must be a code such as en, got 'english'"),
        (["{model}", "--host", "192.0.2.77", "--without-key"], "--host 192.0.2.77 --port 8000: "),
    ],
)
def test_what_it_does_not_begin_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    known = {"model": str(folder), "empty": str(tmp_path / "empty")}
    found = CliRunner().invoke(app, ["serve", *(a.format(**known) for a in arguments)])
    assert found.exit_code == 2
    assert words in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_a_port_that_is_taken(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = CliRunner().invoke(app, ["serve", str(folder), "--port", str(port)])
    assert (found.exit_code, len(found.stderr.splitlines())) == (2, 1)
    assert f"--host 127.0.0.1 --port {port}: Address already in use" in found.stderr


def test_what_the_demo_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--demo` is the model that `zipper demo` leaves, under a name of its own; nothing is made or fetched for it."""
    (tmp_path / "zipper-demo" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    source = _source(None, demo=True)
    assert (Path(source), _name(source)) == (Path("zipper-demo/model"), "zipper-demo")


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    """One line, though the server has begun to listen by then."""
    (tmp_path / "config.json").write_text("{}")
    found = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "0"])
    assert found.exit_code == 2
    assert "error:" in found.stderr.splitlines()[-1]


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[tuple[Any, str]]:
    key = tmp_path / "key"
    key.write_text("a-key\n")
    command = [sys.executable, "-m", "zipper_lm", "serve", str(folder), "--port", "0", "--api-key-file", str(key)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "500"})
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        address = re.search(r"http://127.0.0.1:\d+", first)
        assert address is not None, first
        yield process, address[0]
    finally:
        process.kill()
        process.wait()


def test_its_life(server: tuple[Any, str]) -> None:
    """It answers 503 while it loads, serves, and after SIGTERM finishes what it has begun."""
    process, address = server

    def ask(route: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        request = urllib.request.Request(
            f"{address}{route}", body, {"authorization": "Bearer a-key", "content-type": kind}
        )
        return urllib.request.urlopen(request, timeout=60)

    with pytest.raises(urllib.error.HTTPError) as caught:
        ask("/health")
    assert (caught.value.code, json.loads(caught.value.read())) == (503, {"status": "loading"})
    assert process.stderr.readline().startswith("serving digits at http://")
    assert json.loads(ask("/health").read()) == {"status": "ok"}
    assert json.loads(ask("/v1/models").read())["data"][0]["id"] == "digits"
    form = b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\ndigits\r\n'
    form += (
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + sound_file() + b"\r\n--x--\r\n"
    )
    assert json.loads(ask("/v1/audio/transcriptions", form, "multipart/form-data; boundary=x").read())["text"]
    given = {"model": "digits", "document": [{"modality": "speech", "ids": [5, 6]}], "schedule": "text", "stream": True}
    response = ask("/v1/documents", json.dumps(given).encode())
    assert response.read(10)
    process.send_signal(signal.SIGTERM)
    assert b"document.done" in response.read()
    began = time.monotonic()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 20
    assert process.stderr.read().strip() == "interrupted"
