"""A tiny model with codecs, served: by a client in this process, or by a real server on loopback."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tiny import often_ending, open_gates
from transformers import LlamaConfig, LlamaForCausalLM

from zipper_lm import Engine, ZipperModel, ZipSpec
from zipper_lm.codecs.pixels import PixelCodec, PixelCodecConfig
from zipper_lm.codecs.speech import SpeechCodec
from zipper_lm.codecs.text import TextCodec

pytest.importorskip("fastapi", reason="needs the extra `serve`")

NAME = "tiny"
WORDS = "zero one two three four five six seven eight nine, don't (say) 10 or 9!"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} say {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}nine {% endif %}"
)


def voice(seconds: float = 1.0, seed: int = 0, rate: int = 16_000) -> np.ndarray:
    """Something like a voice: a gliding tone with overtones, louder and quieter; float32 [time]."""
    draw = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    pitch = 120 + 40 * np.sin(2 * np.pi * (0.7 * time + draw.random()))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    wave = sum(np.sin(k * phase + k) / k for k in range(1, 12))
    return (0.15 * wave * (0.6 + 0.4 * np.sin(2 * np.pi * 2.3 * time + seed))).astype(np.float32)


def sound_file(form: str = "WAV", seconds: float = 1.0, seed: int = 0, rate: int = 16_000, **how: Any) -> bytes:
    """A sound file's bytes."""
    out = io.BytesIO()
    soundfile.write(out, voice(seconds, seed, rate), rate, format=form, **how)
    return out.getvalue()


@functools.cache
def codecs(chat: bool = True) -> dict[str, Any]:
    """Of text, speech and pictures."""
    text = TextCodec.train([WORDS, "user assistant system", WORDS.upper(), "< / >"], vocab_size=96)
    if chat:
        text.tokenizer.chat_template = CHAT_TEMPLATE
    return {
        "text": text,
        "speech": SpeechCodec.fit([voice(3.0, seed) for seed in range(4)], units=64),
        "image": PixelCodec(PixelCodecConfig(height=4, width=4, levels=4)),
    }


def served_model(
    names: tuple[str, ...] = ("text", "speech"), *, chat: bool = True, tokens: int = 40, zips: Any = None
) -> ZipperModel:
    """Towers of these names, all of which read each other; what they write is as random as their weights, and ends."""
    chosen = {name: codecs(chat)[name] for name in names}
    towers = {}
    for seed, (name, codec) in enumerate(chosen.items()):
        torch.manual_seed(seed)
        special = {f"{k}_token_id": getattr(codec, f"{k}_id") for k in ("bos", "eos", "pad")}
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        shape |= {"max_position_embeddings": 8192, "initializer_range": 0.3}
        towers[name] = LlamaForCausalLM(LlamaConfig(vocab_size=codec.vocab_size, **shape, **special)).eval()
    torch.manual_seed(9)
    model = ZipperModel.fuse(towers, codecs=chosen, zips=zips or ZipSpec(gate_start=1.0, layers=2))
    open_gates(model, 1.0)
    model.generation_settings = {name: {"max_new_tokens": tokens} for name in names}
    return often_ending(model, 1.0).eval()


@contextlib.contextmanager
def served(model: ZipperModel | None = None, *, slots: int = 4, **how: Any) -> Iterator[Any]:
    """A service of a model; `how`: as of `Service`."""
    from zipper_lm.serve.service import Service

    service = Service(NAME, **how)
    service.begin(Engine(model or served_model(), slots=slots, compile=False))
    try:
        yield service
    finally:
        service.close()


@contextlib.contextmanager
def client_of(service: Any, base: str = "http://127.0.0.1") -> Iterator[Any]:
    """A client in this process."""
    from fastapi.testclient import TestClient

    from zipper_lm.serve.app import create_app

    with TestClient(create_app(service), base_url=base, raise_server_exceptions=False) as client:
        yield client


@contextlib.contextmanager
def running(service: Any, grace: float = 5.0, port: int = 0) -> Iterator[str]:
    """A real server in a thread, on loopback; yields its address."""
    from zipper_lm.serve.lifecycle import Server, listen

    server, listening = Server(service, grace), listen("127.0.0.1", port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < until
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive()
