"""What it takes to learn beside a stream that is larger than new weights expect, and what a scale makes of it.

python benchmarks/stream_scale.py docs/runs/stream-scale.json

A tiny frozen decoder is made anew with all that writes into its residual stream multiplied by a
factor. Its norms take that away again, so that it computes the same, but what zips and its input projection add is as
much smaller beside it. Counted are Adam's steps until the loss on sixteen documents, in which another tower has two
tokens for each word, is half of what it was; the median and worst of the seeds. The record is the last line of the
output.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common.record import begun, finish, keep
from transformers import LlamaConfig, LlamaForCausalLM

from zipper_lm import Document, Segment, TowerSpec, ZipperModel, ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.models.assemble import connect

FACTORS = (1, 16)
SCALES: dict[str, tuple[Any, Any]] = {
    "as it is": (1.0, 1.0),
    "zips": ("stream", 1.0),
    "input projection": (1.0, "stream"),
    "both": ("stream", "stream"),
}
"""Of zips, of the input projection."""
RATE, CAP = 1e-3, 400
WORDS = range(3, 31)
FIRST, SECOND = 31, 62
"""Where the other tower's ids for the halves of words begin."""


def decoder(vocabulary: int, factor: int, seed: int) -> LlamaForCausalLM:
    """A random one, with a stream so many times as large."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "tie_word_embeddings": False}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes, **heads)).eval()
    with torch.no_grad():
        made.model.embed_tokens.weight.mul_(factor)
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight.mul_(factor)
            layer.mlp.down_proj.weight.mul_(factor)
    return made


def documents(seed: int) -> list[Document]:
    """Words, after the same words in halves."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(16):
        words = (WORDS.start + torch.randint(len(WORDS), (4,), generator=generator)).tolist()
        halves = [half for word in words for half in (FIRST + word, SECOND + word)]
        made.append(Document([Segment("speech", ids=halves), Segment("text", ids=words, target=True)]))
    return made


def steps_to_half(factor: int, scales: tuple[Any, Any], seed: int) -> int:
    """The steps; `CAP` if they do not suffice."""
    backbones = {"text": decoder(WORDS.stop, factor, seed), "speech": decoder(SECOND + WORDS.stop, 1, seed)}
    special = {"backbone": {}, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    towers = {name: TowerSpec(source="", **special) for name in backbones}
    towers["text"] = replace(towers["text"], input_projection_scale=scales[1])
    torch.manual_seed(seed)
    model = connect(ZipperModel, towers, backbones, ZipSpec(layers=2, scale=scales[0]), None)
    batch = collate(documents(seed), model.specials)
    adam = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=RATE, betas=(0.9, 0.99))
    losses: list[float] = []
    for step in range(CAP):
        loss = model(batch).loss
        losses.append(loss.item())
        if losses[-1] < losses[0] / 2:
            return step
        adam.zero_grad()
        loss.backward()
        adam.step()
    return CAP


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    given = parser.parse_args()
    record = begun(rate=RATE, cap=CAP, seeds=given.seeds, rows=[])
    for factor in FACTORS:
        for name, scales in SCALES.items():
            steps = [steps_to_half(factor, scales, seed) for seed in given.seeds]
            figures = {"steps": steps, "median": statistics.median(steps), "worst": max(steps)}
            record["rows"].append({"factor": factor, "scale": name, **figures})
            keep(record, given.record)
    finish(record, given.record)


if __name__ == "__main__":
    main()
