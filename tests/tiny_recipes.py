"""Recordings of tones that stand for words, towers made for them, and recipes: what training and commands need."""

from __future__ import annotations

import atexit
import csv
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zipper_lm.codecs.speech import SpeechCodec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.evaluation.recogniser import Recogniser, RecogniserConfig
from zipper_lm.jobs.recipes.reader import build
from zipper_lm.jobs.recipes.schema import FuseRecipe

TONES = {"one": 400, "two": 900, "six": 1600}
SPLITS = {"train": 12, "validation": 4, "test": 4}


def say(text: str) -> np.ndarray:
    """A tone of 0.15 s for each word, float32 at 16 kHz."""
    time = np.arange(2400) / 16_000
    return np.concatenate([0.3 * np.sin(2 * np.pi * TONES[w] * time) for w in text.split()]).astype(np.float32)


@functools.cache
def workshop() -> Path:
    """A folder with ``data``, the towers ``text`` and ``speech``, and a ``judge``; made once, gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="zipper-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    draw = np.random.default_rng(0)
    said: dict[str, list[str]] = {}
    for split, count in SPLITS.items():
        (folder / "data" / split).mkdir(parents=True)
        said[split] = [" ".join(draw.choice(list(TONES), size=draw.integers(1, 4))) for _ in range(count)]
        with (folder / "data" / split / "metadata.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "transcription", "speaker"])
            for number, text in enumerate(said[split]):
                soundfile.write(folder / "data" / split / f"{number}.wav", say(text), 16_000)
                table.writerow([f"{number}.wav", text, "even" if number % 2 == 0 else "odd"])
    waves = [say(text) for text in said["train"]]
    codecs = {
        "text": TextCodec.train(said["train"] + list(TONES), vocab_size=32),
        "speech": SpeechCodec.fit(waves, units=8, frames_per_token=4),
    }
    for name, codec in codecs.items():
        torch.manual_seed(0)
        special = {f"{k}_token_id": getattr(codec, f"{k}_id") for k in ("bos", "eos", "pad")}
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        tower = LlamaForCausalLM(LlamaConfig(vocab_size=codec.vocab_size, **shape, **special))
        tower.save_pretrained(folder / name)
        codec.save_pretrained(folder / name)
    config = RecogniserConfig(characters=" einoswtx", channels=8, hidden=8, dilations=(1,))
    Recogniser.fit(waves, said["train"], epochs=1, config=config).save_pretrained(folder / "judge")
    return folder


def plain_recipe(output: Path, **changes: Any) -> dict[str, Any]:
    """A fusion of two steps, as plain values; `changes` replace what is at the top, or in ``training``."""
    here = workshop()
    training = {"steps": 2, "batch_size": 4, "log_every": 1, "learning_rate": 1e-2, "arguments": {"disable_tqdm": True}}
    return {
        "towers": {"text": str(here / "text"), "speech": {"source": str(here / "speech"), "train": "full"}},
        "data": str(here / "data"),
        "tasks": {"speech->text": 1.0, "text->speech": 1.0},
        "zips": [{"layers": 2, "gate_start": 0.1}],
        "generation": {"text": {"max_new_tokens": 4}, "speech": {"max_new_tokens": 8}},
        "judge": str(here / "judge"),
        "output": str(output),
        **changes,
        "training": training | changes.get("training", {}),
    }


def tiny_recipe(output: Path, **changes: Any) -> FuseRecipe:
    """`plain_recipe`, typed."""
    return build(FuseRecipe, plain_recipe(output, **changes))
