"""Codecs: one file of JSON in a saved codec is changed; it is loaded, and encodes and decodes a little."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from fuzz.target import Target
from fuzz.targets.folders import changes, link, replace
from PIL import Image
from tiny_served import codecs, voice
from transformers import SpeechT5FeatureExtractor, SpeechT5HifiGan, SpeechT5HifiGanConfig

from zipper_lm.codecs.codec import load_codec
from zipper_lm.codecs.color_clusters import ColorClusters
from zipper_lm.codecs.mel_vocoder import MelVocoder
from zipper_lm.codecs.sequence import SequenceCodec
from zipper_lm.codecs.speech import SpeechCodec

WORDS = (
    *(
        "text",
        "speech",
        "pixels",
        "sequence",
        "color-clusters",
        "hubert-units",
        "neural-audio",
        "vq-image",
        "stack",
        "mean",
    ),
    *("BPE", "Unigram", "WordPiece", "WordLevel", "ByteLevel", "Metaspace", "NFC", "Replace", "Split", "Precompiled"),
    *("auto_map", "tokenizer_class", "LlamaTokenizer", "T5TokenizerFast", "model_type", "vocoder", "speaker", "model"),
    {"Regex": "(a+)+$"},
    {"Regex": "(?=" * 50},
    {"String": ""},
)


def make() -> Target:
    """Of each kind that is made here."""
    names = [str(file.relative_to(saved())) for file in sorted(saved().rglob("*.json"))]
    return Target(name="codecs", run=run, share=55, inputs=changes(saved(), names, WORDS))


def run(data: bytes, folder: Path) -> None:
    """Loaded as anybody's."""
    name = data.partition(b"\n")[0].decode().split("/")[0]
    link(saved() / name, folder / name)
    replace(folder, data)
    codec = load_codec(folder / name)
    for special in (codec.bos_id, codec.eos_id, codec.pad_id):
        if not 0 <= special < codec.vocab_size:
            raise AssertionError(f"id {special} of {codec.vocab_size}")
    value: Any = {"text": "one two", "sequence": "ACGT", "numbers": [0.5, 1.5]}.get(name)
    if value is None:
        value = Image.fromarray(np.zeros((4, 4, 3), np.uint8)) if name in ("pixels", "colors") else voice(0.1)
    codec.decode(codec.encode([value]))


def _vocoder() -> MelVocoder:
    sizes = {"upsample_initial_channel": 16, "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]]}
    return MelVocoder(SpeechT5HifiGan(SpeechT5HifiGanConfig(**sizes)), SpeechT5FeatureExtractor())


@functools.cache
def saved() -> Path:
    """A folder with a folder for each."""
    folder = Path(tempfile.mkdtemp(prefix="zipper-fuzz-codecs-"))
    draw = np.random.default_rng(0)
    made = {
        "text": codecs()["text"],
        "pixels": codecs()["image"],
        "speech": codecs()["speech"],
        "refined": SpeechCodec.fit([voice(1.0)], units=8, refine_steps=1, width=8),
        "vocoder": SpeechCodec.fit([voice(1.0)], units=8, refine_steps=1, width=8, vocoder=_vocoder()),
        "sequence": SequenceCodec.make(alphabet="ACGT"),
        "numbers": SequenceCodec.make(bins=4, spacing="even", low=0.0, high=2.0),
        "colors": ColorClusters(draw.uniform(-1, 1, (8, 3)).astype(np.float32)),
    }
    for name, codec in made.items():
        codec.save_pretrained(folder / name)
    return folder
