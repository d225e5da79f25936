"""`zipper serve` under load: many clients on loopback, some of which do not behave, beside one client alone.

python benchmarks/serve.py [docs/runs/serve-cpu.json] [--model FOLDER] [--clients 64] [--seconds 60]

Without a model, the demo's two towers are fused anew, with zips that nobody has trained: what is written does not
change what it costs. The server is a process of its own. Each client asks again and again, for one of several things,
also breaking off, sending rubbish, or reading slowly. Greedy answers must be those that one client alone was given,
byte for byte. Counted are answers that were lost or mixed up, how long it takes until the first sound comes, and the
server's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import psutil
import torch
from common.record import begun, finish
from transformers.utils import logging

from zipper_lm import ZipperModel, ZipSpec
from zipper_lm.serve.forms import RATE, encoded

ASSETS = Path(__file__).parent.parent / "src" / "zipper_lm" / "demo" / "assets"
NAME = "served"
TEXT = ("three one four", "nine", "two two seven six", "one five eight zero")
SETTINGS = {"text": {"max_new_tokens": 24}, "speech": {"max_new_tokens": 75}}
TURNS = 3  # of each request, alone
JSON = "application/json"


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        kind: what it is counted as. route, body, content: of it. heard: whether its answer is sound.
        ends: how its client behaves.
    """

    kind: str
    route: str
    body: bytes
    content: str = JSON
    heard: bool = False
    ends: str = "well"

    @property
    def name(self) -> tuple[str, bytes]:
        """What has the same answer."""
        return self.route, self.body


@dataclass
class Told:
    """What became of one request: `first`, `whole`: seconds until its first byte of content, and its last."""

    status: int
    data: bytes
    first: float
    whole: float


@dataclass
class Seen:
    """All that clients saw."""

    ended: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    whole: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    lost: list[str] = field(default_factory=list)
    mixed_up: int = 0
    refused: int = 0


def tone(seed: int, seconds: float = 1.5) -> bytes:
    """A sound file of something like a voice."""
    at = np.arange(int(16_000 * seconds)) / 16_000
    pitch = 2 * np.pi * np.cumsum(110 + 10 * seed + 30 * np.sin(2 * np.pi * at)) / 16_000
    wave = sum(np.sin(k * pitch + k) / k for k in range(1, 10)) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * at))
    return encoded(0.1 * wave.astype(np.float32), "wav")


def form(sound: bytes, **fields: str) -> tuple[bytes, str]:
    """A form with a file."""
    parts = [f'content-disposition: form-data; name="{k}"\r\n\r\n{v}'.encode() for k, v in fields.items()]
    parts.append(b'content-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + sound)
    return b"".join(
        b"--zipper\r\n" + part + b"\r\n" for part in parts
    ) + b"--zipper--\r\n", "multipart/form-data; boundary=zipper"


def requests() -> list[Asked]:
    """Everything that clients ask for."""
    asked = []
    for number, text in enumerate(TEXT):
        sound = tone(number)
        for stream in ("false", "true"):
            body, content = form(sound, model=NAME, stream=stream)
            asked.append(Asked("transcription", "/v1/audio/transcriptions", body, content))
        say = {"model": NAME, "input": text, "voice": "alloy", "response_format": "pcm"}
        asked += [Asked("speech", "/v1/audio/speech", json.dumps(say).encode(), heard=True)] * 2
        part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound).decode(), "format": "wav"}}
        chat = {"model": NAME, "messages": [{"role": "user", "content": [part]}], "modalities": ["text", "audio"]}
        chat |= {"audio": {"voice": "alloy", "format": "pcm16"}}
        asked.append(Asked("chat", "/v1/chat/completions", json.dumps(chat).encode()))
        document = {"model": NAME, "document": [{"modality": "text", "text": text}], "schedule": ["speech", "text"]}
        asked.append(Asked("document", "/v1/documents", json.dumps({**document, "stream": True}).encode()))
        for kind, ends in (("speech, broken off", "breaks off"), ("speech, read slowly", "reads slowly")):
            asked.append(Asked(kind, "/v1/audio/speech", json.dumps(say).encode(), heard=True, ends=ends))
        body, content = form(random.Random(number).randbytes(20_000), model=NAME)
        asked.append(Asked("rubbish", "/v1/audio/transcriptions", body, content, ends="is refused"))
    return asked


async def ask(port: int, asked: Asked) -> Told:
    """Send one request and read the answer, as its client does."""
    began, first, data = time.perf_counter(), 0.0, bytearray()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
    try:
        head = (
            f"POST {asked.route} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: {asked.content}\r\n"
        )
        writer.write(f"{head}content-length: {len(asked.body)}\r\n\r\n".encode() + asked.body)
        await writer.drain()
        told = (await reader.readuntil(b"\r\n\r\n")).lower()
        while True:
            size = int(await reader.readline(), 16) if b"chunked" in told else -1
            piece = await reader.readexactly(size) if size >= 0 else await reader.read()
            first = first or time.perf_counter() - began
            data += piece
            if size <= 0 or asked.ends == "breaks off":
                break
            await reader.readexactly(2)
            if asked.ends == "reads slowly":
                await asyncio.sleep(0.3)
    finally:
        writer.close()
    return Told(int(told.split()[1]), bytes(data), first, time.perf_counter() - began)


def plain(data: bytes) -> bytes:
    """An answer without what is another each time."""
    return re.sub(rb'"(id|created|expires_at)":\s*("[^"]*"|\d+)', b"", data)


def judge(seen: Seen, asked: Asked, told: Told, expected: dict[tuple[str, bytes], bytes]) -> None:
    """Count one answer."""
    seen.ended[asked.kind] += 1
    wanted = 400 if asked.ends == "is refused" else 200
    if told.status == 429:
        seen.refused += 1
    elif told.status != wanted:
        seen.lost.append(f"{asked.kind}: {told.status} {told.data[:200]!r}")
    elif wanted == 200:
        if asked.ends != "breaks off" and plain(told.data) != expected[asked.name]:
            seen.mixed_up += 1
        seen.first[asked.kind].append(told.first)
        seen.whole[asked.kind].append(told.whole)


async def client(port: int, number: int, until: float, all_asked: list[Asked], expected: Any, seen: Seen) -> None:
    """Ask until the time is over."""
    draw = random.Random(number)
    while time.perf_counter() < until:
        asked = draw.choice(all_asked)
        try:
            told = await asyncio.wait_for(ask(port, asked), 120)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            seen.ended[asked.kind] += 1
            seen.lost.append(f"{asked.kind}: {type(error).__name__} {error}")
            continue
        judge(seen, asked, told, expected)


def cpu(server: psutil.Process) -> float:
    """Seconds of all cores that a process has had: what counts where others take them, too."""
    taken = server.cpu_times()
    return float(taken.user + taken.system)


async def alone(
    port: int, all_asked: list[Asked], server: psutil.Process
) -> tuple[dict[tuple[str, bytes], bytes], dict[str, Any]]:
    """The answers that one client is given, and how fast."""
    expected: dict[tuple[str, bytes], bytes] = {}
    seen, real_time, count = Seen(), [], 0
    sound = of_cpu = 0.0
    well = list(dict.fromkeys(a for a in all_asked if a.ends == "well"))
    for asked in well:  # the steps are made, and what is read once is read
        expected[asked.name] = plain((await ask(port, asked)).data)
    began = time.perf_counter()
    for _ in range(TURNS):
        for asked in well:
            before = cpu(server)
            told = await ask(port, asked)
            judge(seen, asked, told, expected)
            count += 1
            if asked.heard:
                sound += len(told.data) / 2 / RATE
                of_cpu += cpu(server) - before
                real_time.append(told.whole / (len(told.data) / 2 / RATE))
    taken = time.perf_counter() - began
    if seen.lost or seen.mixed_up:
        raise SystemExit(f"one client alone is not told the same twice: {seen.lost[:3]}, {seen.mixed_up} others")
    facts = {
        "requests": count,
        "requests_per_second": round(count / taken, 2),
        "first_sound_seconds": spread(seen.first["speech"]),
        "real_time_factor": spread(real_time),
        "cpu_seconds_per_second_of_sound": round(of_cpu / sound, 3),
    }
    return expected, facts


async def together(port: int, given: argparse.Namespace, all_asked: list[Asked], expected: Any, server: Any) -> Any:
    """Everybody at once."""
    seen, began, before = Seen(), time.perf_counter(), cpu(server)
    memory: list[float] = []

    async def watch() -> None:
        while True:
            memory.append(server.memory_info().rss / 2**20)
            await asyncio.sleep(0.5)

    watching = asyncio.ensure_future(watch())
    until = began + given.seconds
    await asyncio.gather(*(client(port, n, until, all_asked, expected, seen) for n in range(given.clients)))
    taken = time.perf_counter() - began
    watching.cancel()
    third = max(1, len(memory) // 3)
    parts = [median(memory[i : i + third]) for i in (0, third, len(memory) - third)]
    return {
        "clients": given.clients,
        "seconds": round(taken, 1),
        "requests": dict(seen.ended),
        "requests_per_second": round(sum(seen.ended.values()) / taken, 2),
        "cores": round((cpu(server) - before) / taken, 2),
        "lost": len(seen.lost),
        "lost_examples": seen.lost[:5],
        "mixed_up": seen.mixed_up,
        "told_to_come_again": seen.refused,
        "first_sound_seconds": spread(seen.first["speech"]),
        "answer_seconds": {kind: spread(times) for kind, times in sorted(seen.whole.items())},
        "memory_mib": {f"{when} third": round(part, 1) for when, part in zip(("first", "middle", "last"), parts)},
    }


def spread(times: list[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    if not times:
        return {}
    return {"p50": round(median(times), 3), "p95": round(quantiles(times, n=20)[-1], 3) if len(times) > 1 else times[0]}


def saved(folder: Path) -> Path:
    """The demo's towers with zips between them."""
    torch.manual_seed(0)
    towers: dict[str, Any] = {name: str(ASSETS / name) for name in ("text", "speech")}
    model = ZipperModel.fuse(towers, zips=ZipSpec(layers=4, gate_start=0.3))
    model.generation_settings = SETTINGS
    model.save_pretrained(folder, bundle_towers=True, card=False)
    return folder


def served(model: Path, slots: int) -> tuple[subprocess.Popen[str], int]:
    """A server, and its port."""
    command = [sys.executable, "-m", "zipper_lm", "serve", str(model), "--port", "0", "--name", NAME]
    process = subprocess.Popen([*command, "--slots", str(slots), "--queue", "512"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    port = 0
    for line in process.stderr:
        if (found := re.search(r":(\d+)", line.split("http", 1)[-1])) is not None:
            port = int(found[1])
        if line.startswith("serving"):
            return process, port
    raise SystemExit("the server did not begin")


def main(make: Callable[[Path], Path] = saved) -> None:
    """Serve, ask alone, ask together; write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--slots", type=int, default=8)
    given = parser.parse_args()
    logging.disable_progress_bar()
    record = begun(
        model=str(given.model.name) if given.model else "the demo's towers, zips not trained", slots=given.slots
    )
    with tempfile.TemporaryDirectory() as folder:
        process, port = served(given.model or make(Path(folder) / "model"), given.slots)
        try:
            server, asked = psutil.Process(process.pid), requests()
            expected, record["alone"] = asyncio.run(alone(port, asked, server))
            print(record["alone"], file=sys.stderr)
            record["together"] = asyncio.run(together(port, given, asked, expected, server))
            record["alive"] = process.poll() is None
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    finish(record, given.output)


if __name__ == "__main__":
    main()
