"""The shapes of `examples/spoken-digits.yaml`: towers of its size, and rows as long as its own."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch
from common.turns import device
from transformers import LlamaConfig, LlamaForCausalLM

from zipper_lm import Segment, ZipperModel
from zipper_lm.codecs.speech import SpeechCodec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.collation import Batch
from zipper_lm.data.token_ids import TokenIds
from zipper_lm.fusion.zip_spec import ZipSpec

LENGTHS = Path(__file__).parents[2] / "docs/runs/spoken-digits/lengths.json"
LETTERS, UNITS = 64, 515  # ids of each tower
TASKS = {"speech->text": 1.0, "text->speech": 1.26}
WIDTHS = {"text": (128, 4), "speech": (192, 6)}
"""Width and layers of each tower."""


def measured(split: Path) -> list[list[int]]:
    """Tokens of speech and of text of every row of a split, a folder with `metadata.csv`. How many units of sound there
    are does not change how many tokens a second it is, so few are fitted."""
    with (split / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts, sounds = [row["transcription"] for row in rows], [str(split / row["file_name"]) for row in rows]
    text = TextCodec.train(texts, vocab_size=LETTERS)
    speech = SpeechCodec.fit(sounds[:100], units=16, frames_per_token=4)
    return [[len(s), len(t)] for s, t in zip(speech.encode(sounds), text.encode(texts))]


def lengths() -> np.ndarray:
    """Tokens of speech and of text of its 3000 rows, int64 ``[rows, 2]``."""
    return np.array(json.loads(LENGTHS.read_text(encoding="utf-8")))


def rows(times: int = 1) -> list[dict[str, Segment]]:
    """Encoded rows of those lengths, or so many times as long, with random ids."""
    draw = np.random.default_rng(0)

    def segment(name: str, ids: int, length: int) -> Segment:
        return Segment(name, ids=TokenIds(draw.integers(3, ids, length * times)))

    return [{"speech": segment("speech", UNITS, s), "text": segment("text", LETTERS, t)} for s, t in lengths()]


def model() -> ZipperModel:
    """Towers of its size with random weights and its zips; the text tower is frozen."""
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    backbones = {}
    for name, (width, layers) in WIDTHS.items():
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096}
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
        ids = LETTERS if name == "text" else UNITS
        backbones[name] = LlamaForCausalLM(LlamaConfig(vocab_size=ids, **sizes, **heads, **special))
    return ZipperModel.fuse(backbones, zips=ZipSpec(layers=4, positions="sinusoid"), train={"speech": "full"})


def train(model: ZipperModel, batch: Batch) -> None:
    """Forward and backward; the gradients are dropped."""
    loss = model(batch.to(device()), return_logits=False).loss
    assert loss is not None
    loss.backward()
    model.zero_grad()
