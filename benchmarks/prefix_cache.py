"""A training step around a frozen tower whose lower layers are known (`training.prefix_cache`), beside one without.

python benchmarks/prefix_cache.py [docs/runs/prefix-cache.json] [--size 135m] [--repeats 7]

A random text tower of SmolLM2-135M's shape, frozen, and a small speech tower, trained, in float32 on one thread. Text
reads speech in its upper third, and is read there. A step is collation, states of the batch's documents from where
they are kept, loss, gradients and AdamW. Beside it: the same model without, and one whose text tower has its input
projection at its embeddings, the default, so that gradients go down through all its layers. In turns; what counts is
the median of ratios.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from common.record import begun, finish, keep
from common.turns import device, ratio, seconds, turns
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from zipper_lm import Document, Segment, TowerSpec, ZipperModel, ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.fusion.prefix import prefix_depths
from zipper_lm.training.prefix_cache import PrefixCache, PrefixMode, keep_prefixes, towers_kept

SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
PLAIN: dict[str, Literal["none", "residual"]] = {"without": "none", "projection at embeddings": "residual"}
MODES: tuple[PrefixMode, ...] = ("memory", "disk")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the text tower; `zips`: text's layers that read and are read; `batch`: documents of a step."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    inner: int
    ids: int
    zips: tuple[int, ...]
    batch: int


SIZES = {
    "135m": Size(width=576, depth=30, heads=9, kv_heads=3, inner=1536, ids=49152, zips=(20, 22, 24, 26, 28), batch=8),
    "tiny": Size(width=32, depth=6, heads=4, kv_heads=2, inner=48, ids=31, zips=(4, 5), batch=4),
}


def save_text(size: Size, folder: Path) -> None:
    """The text tower, which every model is then made of."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.ids,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=True,
        **SPECIAL,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make(size: Size, folder: Path, projection: Literal["none", "residual"]) -> ZipperModel:
    """Both towers, with an input projection before text's first layer or none."""
    torch.manual_seed(0)
    count = len(size.zips)
    small = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": count, "num_attention_heads": 4}
    zips = [
        ZipSpec(reader="text", source="speech", layers=[*size.zips], source_layers=[*range(count)]),
        ZipSpec(reader="speech", source="text", layers=[*range(count)], source_layers=[*size.zips]),
    ]
    text = TowerSpec(source=str(folder), input_projection=projection)
    speech = LlamaForCausalLM(LlamaConfig(vocab_size=517, **small, **SPECIAL))
    model = ZipperModel.fuse({"text": text, "speech": speech}, zips=zips, train={"speech": "full"})
    return model.to(device()).train()


def documents(size: Size, tasks: list[tuple[str, str]]) -> list[Document]:
    """Pairs of 20 to 60 ids of text and 40 to 120 of speech, of the tasks by turns."""
    draw = torch.Generator().manual_seed(1)

    def drawn(name: str) -> list[int]:
        least, ids = (20, size.ids) if name == "text" else (40, 517)
        length = int(torch.randint(least, 3 * least + 1, (1,), generator=draw))
        return torch.randint(3, ids, (length,), generator=draw).tolist()

    pairs = [tasks[number % len(tasks)] for number in range(4 * size.batch)]
    return [
        Document([Segment(first, ids=drawn(first)), Segment(last, ids=drawn(last), target=True)])
        for first, last in pairs
    ]


class Training:
    """Steps over batches of documents, one after the other."""

    def __init__(self, model: ZipperModel, given: list[Document], batch: int, prefixes: PrefixCache) -> None:
        self.model, self.given, self.batch, self.prefixes, self.steps = model, given, batch, prefixes, 0
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(self) -> float:
        start = self.steps * self.batch % len(self.given)
        self.steps += 1
        batch = self.prefixes.fill(collate(self.given[start : start + self.batch], self.model.specials))
        loss = self.model(batch.to(device())).loss
        assert loss is not None
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def measure(size: Size, tasks: list[tuple[str, str]], repeats: int) -> dict[str, Any]:
    """How many times a step without takes one with, and what keeping costs."""
    given = documents(size, tasks)
    row: dict[str, Any] = {"tasks": ["->".join(task) for task in tasks]}
    works: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_text(size, folder / "text")
        for what, projection in PLAIN.items():
            works[what] = Training(make(size, folder / "text", projection), given, size.batch, PrefixCache()).step
        for mode in MODES:
            model, made = make(size, folder / "text", "none"), PrefixCache()
            kept = towers_kept(model, {"text": mode})

            def fill(made: PrefixCache = made, model: Any = model, kept: Any = kept) -> None:
                made.stores |= keep_prefixes(model, kept, given, folder / "states").stores

            row[f"seconds to keep, {mode}"] = round(seconds(fill), 3)
            row["layers kept"] = prefix_depths(model, "text")
            works[mode] = Training(model, given, size.batch, made).step
        row["tokens kept"] = sum(len(s.ids or []) + 2 for d in given for s in d if s.modality == "text")
        row["bytes a token"] = len(row["layers kept"]) * size.width * 4
        taken = turns(works, repeats)
    for other in PLAIN:
        row[f"{other} to kept"] = {mode: ratio(taken[other], taken[mode]) for mode in MODES}
    row["seconds a step"] = {name: round(min(spent), 4) for name, spent in taken.items()}
    return row


def main() -> None:
    """Measure transcription alone, and both directions in every batch; write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--size", choices=list(SIZES), default="135m")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    size = SIZES[given.size]
    record = begun(size=given.size, **asdict(size), repeats=given.repeats, rows=[])
    read, write = ("speech", "text"), ("text", "speech")
    for tasks in ([read], [read, write]):
        row = measure(size, tasks, given.repeats)
        record["rows"].append(row)
        keep(record, given.output)
        print(row, file=sys.stderr)
    finish(record, given.output)


if __name__ == "__main__":
    main()
