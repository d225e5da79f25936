"""What a training step holds and takes where the vocabulary is large: logits of the whole batch, or of a few targets at
a time.

python benchmarks/chunked_loss.py [docs/runs/chunked-loss-49k.json] [--size 49k] [--repeats 5]

Two random towers in float32; text, whose vocabulary is large, is a frozen tower that reads speech. Half of the text is
target. `whole` returns its logits, as the model does when it is called; `parts` does not, as in training. They take
turns, on one thread. Memory is the peak of what a step holds beyond what was there before it, of a step in a process of
its own on a CPU. What counts is the median of ratios.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from common.record import begun, finish
from common.turns import device, ratio, turns
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from zipper_lm import Document, Segment, ZipperModel, ZipSpec
from zipper_lm.data.collation import Batch, collate
from zipper_lm.fusion import head

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
WAYS = ("whole", "parts")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the text tower, and of the batch: documents, and tokens of text and of speech in each. `held`: numbers of
    logits that are made at once in parts, `None` as it is."""

    width: int
    depth: int
    heads: int
    ids: int
    documents: int
    tokens: int
    held: int | None = None


SIZES = {
    "49k": Size(width=576, depth=6, heads=9, ids=49152, documents=8, tokens=256),
    "128k": Size(width=1024, depth=4, heads=16, ids=128256, documents=8, tokens=256),
    "tiny": Size(width=32, depth=2, heads=4, ids=600, documents=2, tokens=20, held=2400),
}


def make(size: Size) -> tuple[ZipperModel, Batch]:
    """The model and what it is trained on."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": size.depth, "num_attention_heads": size.heads, "tie_word_embeddings": True}
    text = LlamaConfig(
        vocab_size=size.ids, hidden_size=size.width, intermediate_size=2 * size.width, **shape, **SPECIAL
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    speech = LlamaConfig(vocab_size=517, **sizes, **SPECIAL)
    backbones = {"text": LlamaForCausalLM(text), "speech": LlamaForCausalLM(speech)}
    zips = ZipSpec(reader="text", source="speech", layers=2, gate_start=0.1)
    model = ZipperModel.fuse(backbones, zips=zips).to(device()).train()
    draw = partial(torch.randint, generator=torch.Generator().manual_seed(1))
    documents = [
        Document(
            [
                Segment("text", ids=draw(3, size.ids, (size.tokens // 2,)).tolist()),
                Segment("speech", ids=draw(3, 517, (size.tokens,)).tolist()),
                Segment("text", ids=draw(3, size.ids, (size.tokens // 2,)).tolist(), target=True),
            ]
        )
        for _ in range(size.documents)
    ]
    return model, collate(documents, model.specials).to(device())


def step(model: ZipperModel, batch: Batch, way: str) -> float:
    """One step's loss and gradients, which are dropped."""
    output = model(batch, return_logits=way == "whole")
    assert output.loss is not None
    output.loss.backward()
    model.zero_grad()
    return output.loss.item()


def highest() -> float:
    """MiB that this process, or its tensors on the GPU, held at most so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def held_by_a_step(size: Size, way: str) -> float:
    """MiB at the peak of a step beyond the peak before it; in a process that did nothing else."""
    model, batch = make(size)
    small = Batch({name: {key: tensor[:1] for key, tensor in side.items()} for name, side in batch.items()})
    step(model, small, "parts")  # what is made once
    before = highest()
    step(model, batch, way)
    return highest() - before


def main() -> None:
    """Measure memory in processes of its own, then times in turns; write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--size", choices=list(SIZES), default="49k")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--held-by", choices=WAYS, help="only print what a step holds")
    given = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    size = SIZES[given.size]
    head.HELD = size.held or head.HELD
    if given.held_by:
        print(held_by_a_step(size, given.held_by))
        return
    record = begun(size=given.size, **asdict(size) | {"held": head.HELD}, repeats=given.repeats, device=device())
    held = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--size", given.size, "--held-by", way]
        held[way] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    model, batch = make(size)
    losses = {way: step(model, batch, way) for way in WAYS}
    taken = turns({way: partial(step, model, batch, way) for way in WAYS}, given.repeats)
    record |= {
        "losses": losses,
        "held_mib": {way: round(mib, 1) for way, mib in held.items()},
        "parts_to_whole": {"seconds": ratio(taken["parts"], taken["whole"])},
    }
    if held["whole"] > 0:
        record["parts_to_whole"]["held"] = round(held["parts"] / held["whole"], 3)
    finish(record, given.output)


if __name__ == "__main__":
    main()
