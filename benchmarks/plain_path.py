"""What a token costs on the plain path: a tower that reads another, beside the bare backbone under transformers' own
eager `generate()`.

python benchmarks/plain_path.py [docs/runs/plain-path.json] [--size 135m] [--batches 1 8 32] [--repeats 7]

A random tower of SmolLM2-135M's shape in float32, five zips, 250 tokens of memory in every row. Both write the same
number of tokens from BOS, in turns in one process, on one thread; what they write does not change what it costs.
Counted is each token after the first: neither has a prefix to read then. What counts is the median of ratios.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from common.record import begun, finish, keep
from common.turns import device, ratio, turns
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from zipper_lm import Document, Segment, ZipperModel, ZipSpec

MEMORY = 250  # tokens, BOS and EOS among them
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the tower that writes, and its zips; `tokens`: written in each turn."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    inner: int
    ids: int
    zips: int
    tokens: int


SIZES = {
    "135m": Size(width=576, depth=30, heads=9, kv_heads=3, inner=1536, ids=49152, zips=5, tokens=17),
    "tiny": Size(width=32, depth=4, heads=4, kv_heads=2, inner=48, ids=31, zips=2, tokens=3),
}


def make(size: Size, feed_forward: bool) -> ZipperModel:
    """The tower, and a small one that it reads."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=size.ids,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=True,
        **SPECIAL,
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": size.zips, "num_attention_heads": 4}
    speech = LlamaConfig(vocab_size=517, **sizes, **SPECIAL)
    zips = ZipSpec(reader="text", source="speech", layers=size.zips, feed_forward=feed_forward)
    backbones = {"text": LlamaForCausalLM(text), "speech": LlamaForCausalLM(speech)}
    return ZipperModel.fuse(backbones, zips=zips).to(device()).eval()


def documents(batch: int) -> list[Document]:
    """What is read, in every row."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(3, 517, (batch, MEMORY - 2), generator=generator).tolist()
    return [Document([Segment("speech", ids=ids)]) for ids in drawn]


def further_token(model: ZipperModel, batch: int, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each token after the first, in every turn."""
    given, backbone = documents(batch), model.tower("text").backbone
    start = torch.zeros(batch, 1, dtype=torch.long, device=device())

    def zipped(count: int) -> None:
        model.generate(given, ["text"], settings={"text": {"max_new_tokens": count, "min_new_tokens": count}})

    def bare(count: int) -> None:
        how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "disable_compile": True}
        backbone.generate(input_ids=start, attention_mask=torch.ones_like(start), **how)  # type: ignore[operator]

    of = {"zipped": zipped, "bare": bare}
    works = {(what, count): partial(work, count) for what, work in of.items() for count in (tokens, 1)}
    taken = turns(works, repeats)
    return {
        what: [(whole - first) / (tokens - 1) for whole, first in zip(taken[what, tokens], taken[what, 1], strict=True)]
        for what in of
    }


def main() -> None:
    """Measure every batch, and once with feed-forward; write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--size", choices=list(SIZES), default="135m")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    size = SIZES[given.size]
    record = begun(size=given.size, **asdict(size), memory=MEMORY, repeats=given.repeats, rows=[])
    for feed_forward in (False, True):
        model = make(size, feed_forward)
        for batch in given.batches[:1] if feed_forward else given.batches:
            taken = further_token(model, batch, size.tokens, given.repeats)
            times = ratio(taken["zipped"], taken["bare"])
            row = {"batch": batch, "feed_forward": feed_forward, "zipped_to_bare": times}
            record["rows"].append(row)
            keep(record, given.output)
            print(row, file=sys.stderr)
    finish(record, given.output)


if __name__ == "__main__":
    main()
