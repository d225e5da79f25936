"""Loading a fused model: a trained tower that is not drawn first, and a frozen one whose hash is remembered.

python benchmarks/model_loading.py [docs/runs/model-loading.json] [--size 135m] [--repeats 5]

A random text tower of SmolLM2-135M's shape and a small speech tower, frozen, in float32 on one thread: how long
`from_pretrained` of their fusion takes. With the text tower trained in full: beside it, its weights are drawn before
they are read. With it frozen: beside it, nothing is remembered. All files are in the system's cache. In turns; what
counts is the median of ratios.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common.record import begun, finish, keep
from common.turns import ratio, turns
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from zipper_lm import ZipperModel, ZipSpec
from zipper_lm.fusion import backbones
from zipper_lm.utils import known_hashes

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the text tower."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    inner: int
    ids: int


SIZES = {
    "135m": Size(width=576, depth=30, heads=9, kv_heads=3, inner=1536, ids=49152),
    "tiny": Size(width=32, depth=4, heads=4, kv_heads=2, inner=48, ids=31),
}


def save(size: Size, folder: Path) -> None:
    """Both towers, and their fusions with the text tower trained and frozen, each by the name of how that was."""
    torch.manual_seed(0)
    shape = {"hidden_size": size.width, "intermediate_size": size.inner, "num_hidden_layers": size.depth}
    heads = {"num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads}
    text = LlamaConfig(vocab_size=size.ids, tie_word_embeddings=True, **shape, **heads, **SPECIAL)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(text).save_pretrained(folder / "text")
    LlamaForCausalLM(LlamaConfig(vocab_size=517, **small, **SPECIAL)).save_pretrained(folder / "speech")
    for train in ("full", "frozen"):
        towers = {name: str(folder / name) for name in ("text", "speech")}
        model = ZipperModel.fuse(towers, zips=ZipSpec(layers=4), train={"text": train})
        model.save_pretrained(folder / train, card=False)


@contextmanager
def drawn() -> Iterator[None]:
    """A trained tower's weights are drawn before they are read, as they were."""
    with mock.patch.object(backbones, "blank_backbone", backbones.from_config):
        yield


@contextmanager
def computed() -> Iterator[None]:
    """No hash is remembered."""
    with mock.patch.object(known_hashes, "FRESH", float("inf")):
        yield


def measure(folder: Path, train: str, without: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """How many times as long it takes without."""

    def load() -> None:
        ZipperModel.from_pretrained(folder / train)

    def load_without() -> None:
        with without():
            load()

    taken = turns({"with": load, "without": load_without}, repeats)
    least = {name: round(min(spent), 4) for name, spent in taken.items()}
    slower = ratio(taken["without"], taken["with"])
    return {"text tower": train, "without": without.__name__, "seconds": least, "without to with": slower}


def main() -> None:
    """Measure both, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--size", choices=list(SIZES), default="135m")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    size = SIZES[given.size]
    record = begun(size=given.size, **asdict(size), repeats=given.repeats, rows=[])
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, ZIPPER_CACHE=f"{name}/cache"):
        save(size, Path(name))
        with mock.patch.object(known_hashes, "FRESH", 0.0):  # files of just now
            for train, without in (("full", drawn), ("frozen", computed)):
                record["rows"].append(measure(Path(name), train, without, given.repeats))
                keep(record, given.output)
                print(record["rows"][-1], file=sys.stderr)
    finish(record, given.output)


if __name__ == "__main__":
    main()
