"""What fusion costs beside the baselines, measured side by side: training, first token, each further token, memory.

python benchmarks/cost.py docs/runs/cost-cpu.json [--repeats 5] [--quick]
python benchmarks/cost.py docs/runs/cost-large-gpu.json --size large

Three random models: Zipper (text frozen, speech trained), one decoder with an expanded vocabulary and Zipper's text
backbone, and one with as many parameters as Zipper. `small` is `examples/spoken-digits.yaml` in float32; `large` a text
tower of a billion parameters and a speech tower of a third of that, in bfloat16; what is trained is float32 then, under
autocast, as in `zipper fuse`. They take turns, `repeats` times; a figure is the median over the turns. On a CPU,
whose speed differs from machine to machine and minute to minute, what counts is the ratio to Zipper in the same turn;
absolute times and peaks of memory are written on a GPU only. The record is written anew after every batch, and is the
last line of the output, too.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common.record import keep
from common.turns import device, ratio, turns
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from zipper_lm import Document, Segment, ZipperModel
from zipper_lm.data.collation import Batch, collate
from zipper_lm.fusion.zip_spec import ZipSpec
from zipper_lm.generation.writer import Writer
from zipper_lm.models.baseline.expand import expand
from zipper_lm.training.parameters import parameter_groups
from zipper_lm.utils.files import as_json

UNITS = 515  # ids of the speech tower
RATIO = 4  # units of speech to one token of text
GENERATED = 32
MODELS = ("zipper", "single-decoder", "single-decoder-as-large")


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured.

    Args:
        text, speech, as_large: width and layers of each backbone. head: width of one; `None` is four heads.
        letters: ids of text. dtype: of the backbones. batches: documents and units of speech in each.
    """

    text: tuple[int, int]
    speech: tuple[int, int]
    as_large: tuple[int, int]
    head: int | None
    letters: int
    dtype: torch.dtype
    batches: tuple[tuple[int, int], ...]


SIZES = {
    "small": Size(
        text=(128, 4),
        speech=(192, 6),
        as_large=(272, 5),
        head=None,
        letters=64,
        dtype=torch.float32,
        batches=((1, 64), (8, 64), (32, 64), (8, 256), (1, 1024)),
    ),
    "large": Size(
        text=(2048, 16),
        speech=(1024, 24),
        as_large=(2304, 19),
        head=128,
        letters=32000,
        dtype=torch.bfloat16,
        batches=((1, 256), (16, 256), (4, 1024)),
    ),
}


class Ids:
    """A codec that only says how many ids there are; the last three are special."""

    kind, rate = "units", 25.0

    def __init__(self, count: int) -> None:
        self.vocab_size, self.bos_id, self.eos_id, self.pad_id = count, count - 3, count - 2, count - 1

    def decode(self, ids: Any) -> list[Any]:
        """Nothing is heard here."""
        return [None for _ in ids]


def backbone(ids: int, width: int, layers: int, size: Size) -> LlamaForCausalLM:
    """A random one; special ids are the last three."""
    special = {"bos_token_id": ids - 3, "eos_token_id": ids - 2, "pad_token_id": ids - 1}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    count = width // size.head if size.head else 4
    heads = {"num_attention_heads": count, "num_key_value_heads": count}
    with torch.device(device()):
        made = LlamaForCausalLM(LlamaConfig(vocab_size=ids, max_position_embeddings=4096, **sizes, **heads, **special))
    return made.to(size.dtype)


def make(name: str, size: Size) -> Writer:
    """One of `MODELS`."""
    torch.manual_seed(0)
    if name == "zipper":
        backbones = {"text": backbone(size.letters, *size.text, size), "speech": backbone(UNITS, *size.speech, size)}
        model: Writer = ZipperModel.fuse(
            backbones, zips=ZipSpec(layers=4, positions="sinusoid"), train={"speech": "full"}
        )
    else:
        base = backbone(size.letters, *(size.text if name == "single-decoder" else size.as_large), size)
        model = expand("text", base, {"text": Ids(size.letters), "speech": Ids(UNITS)})  # type: ignore[dict-item]
    return model.to(device())


def documents(task: str, batch: int, length: int) -> list[Document]:
    """Random ids: `length` units of speech and a quarter of it of text, `batch` documents."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(batch):
        speech = torch.randint(0, UNITS - 3, (length,), generator=generator).tolist()
        text = torch.randint(5, 25, (length // RATIO,), generator=generator).tolist()
        parts = [("speech", speech), ("text", text)] if task == "asr" else [("text", text), ("speech", speech)]
        found.append(Document([Segment(m, ids=i, target=bool(k)) for k, (m, i) in enumerate(parts)]))
    return found


class Trainee:
    """A model with its optimizer and one batch of half ASR, half TTS; `half`: under autocast to bfloat16."""

    def __init__(self, model: Writer, batch: int, length: int, half: bool) -> None:
        self.model, self.half = model, half
        mixed = [*documents("asr", (batch + 1) // 2, length), *documents("tts", batch // 2, length)]
        self.batch: Batch = collate(mixed, model.specials)  # the model moves it
        groups = parameter_groups(model, tower_learning_rate=1e-5, weight_decay=0.0)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5)

    def step(self) -> None:
        """Forward, backward, update."""
        self.model.train()
        with torch.autocast(device(), torch.bfloat16, enabled=self.half):
            loss = self.model(self.batch).loss
        assert loss is not None
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def speak(model: Writer, task: str, batch: int, length: int, tokens: int) -> None:
    """Read what is given and write so many tokens, no more and no less."""
    model.eval()
    target = "text" if task == "asr" else "speech"
    given = [Document([d[0]]) for d in documents(task, batch, length)]
    settings = {target: {"max_new_tokens": tokens, "min_new_tokens": tokens}}
    with torch.no_grad():
        model.generate(given, [target], settings=settings)


Times = dict[str, dict[str, list[float]]]
"""Seconds in every turn, by model and what is measured."""


def every(models: dict[str, Writer], works: dict[str, Callable[[str], Any]], repeats: int) -> Times:
    """Every work of every model in every turn."""
    taken = turns({(name, what): partial(work, name) for what, work in works.items() for name in models}, repeats)
    return {name: {what: taken[name, what] for what in works} for name in models}


def training(models: dict[str, Writer], batch: int, length: int, half: bool, repeats: int) -> Times:
    """Training steps."""
    trainees = {name: Trainee(model, batch, length, half) for name, model in models.items()}
    return every(models, {"training step": lambda n: trainees[n].step()}, repeats)


def speaking(models: dict[str, Writer], batch: int, length: int, repeats: int) -> Times:
    """First and further tokens."""
    works: dict[str, Callable[[str], Any]] = {}
    for task in ("asr", "tts"):
        works[f"{task}: first token"] = lambda n, t=task: speak(models[n], t, batch, length, 1)
        works[f"{task}: {GENERATED} tokens"] = lambda n, t=task: speak(models[n], t, batch, length, GENERATED)
    taken = every(models, works, repeats)
    for of in taken.values():
        for task in ("asr", "tts"):
            pairs = zip(of.pop(f"{task}: {GENERATED} tokens"), of[f"{task}: first token"])
            of[f"{task}: each further token"] = [(whole - first) / (GENERATED - 1) for whole, first in pairs]
    return taken


def kept_memory(model: Writer, batch: int, length: int) -> float:
    """MiB that one training step keeps for its backward pass, parameters not counted: what grows with the batch.
    Without autocast, which would keep copies of the weights, too."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    trainee = Trainee(model, batch, length, half=False)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(trainee.batch).loss  # held until all is counted, so that no storage is freed and used again
    assert loss is not None
    return sum(kept.values()) / 2**20


def peak(model: Writer, work: Callable[[], Any]) -> float:
    """MiB at the peak on a GPU, this model's weights included and others' not."""
    own = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    others = torch.cuda.memory_allocated() - own
    torch.cuda.reset_peak_memory_stats()
    work()
    return round((torch.cuda.max_memory_allocated() - others) / 2**20, 1)


def peak_of_training(model: Writer, batch: int, length: int, half: bool) -> float:
    """Of a training step, with its optimizer's state."""

    def step_twice() -> None:  # the first makes the state
        trainee = Trainee(model, batch, length, half)
        trainee.step()
        trainee.step()

    return peak(model, step_twice)


@dataclass(kw_only=True)
class Measured:
    """What was measured of one batch, by model: seconds in every turn, MiB kept for the backward pass, MiB at peaks."""

    batch: int
    units: int
    times: Times
    kept: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, dict[str, float]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Ratios, and on a GPU times and peaks; without what was not reached yet."""
        zipper = self.times[MODELS[0]]
        row: dict[str, Any] = {"batch": self.batch, "units": self.units}
        if self.kept:
            row["kept_for_backward_mib"] = self.kept
        row["ratio_to_zipper"] = {
            name: {what: ratio(taken, zipper[what]) for what, taken in self.times[name].items()} for name in MODELS[1:]
        }
        if self.peaks:
            row["milliseconds"] = {
                n: {w: round(1e3 * statistics.median(t), 3) for w, t in of.items()} for n, of in self.times.items()
            }
            row["peak_mib"] = self.peaks
        return row


def measure(
    models: dict[str, Writer], size: Size, batches: Sequence[tuple[int, int]], repeats: int
) -> Iterator[list[Measured]]:
    """Training of every batch, then writing; all that is there, after each."""
    gpu = torch.cuda.is_available()
    half = size.dtype == torch.bfloat16
    masters = [p for m in models.values() for p in m.parameters() if p.requires_grad and p.dtype == size.dtype]
    found: list[Measured] = []
    for parameter in masters:
        parameter.data = parameter.data.float()
    for batch, length in batches:
        found.append(Measured(batch=batch, units=length, times=training(models, batch, length, half, repeats)))
        if gpu:
            for name, model in models.items():
                found[-1].peaks[name] = {"training step": peak_of_training(model, batch, length, half)}
        print(f"training, batch {batch}, {length} units: done", file=sys.stderr)
        yield found
    for parameter in masters:
        parameter.data = parameter.data.to(size.dtype)
    for one in found:
        batch, length = one.batch, one.units
        one.kept = {name: round(kept_memory(model, batch, length), 2) for name, model in models.items()}
        for name, taken in speaking(models, batch, length, repeats).items():
            one.times[name] |= taken
            if gpu:
                work = partial(speak, models[name], "tts", batch, length, GENERATED)
                one.peaks[name]["tts"] = peak(models[name], work)
        print(f"speaking, batch {batch}, {length} units: done", file=sys.stderr)
        yield found


def main() -> None:
    """Measure, write the JSON, show a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--quick", action="store_true", help="four documents of 64 units only")
    given = parser.parse_args()
    logging.disable_progress_bar()
    size = SIZES[given.size]
    models = {name: make(name, size) for name in MODELS}
    gpu = torch.cuda.is_available()
    record: dict[str, Any] = {
        "size": given.size,
        "dtype": str(size.dtype).removeprefix("torch."),
        "dtype_of_what_is_trained": "float32",
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()},
        "trained": {n: sum(p.numel() for p in m.parameters() if p.requires_grad) for n, m in models.items()},
        "repeats": given.repeats,
        "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {p: version(p) for p in ("torch", "transformers", "zipper-lm")},
    }
    for found in measure(models, size, [(4, 64)] if given.quick else size.batches, given.repeats):
        record["rows"] = [one.row() for one in found]
        keep(record, given.output)
    table = Table("batch", "units", "what", *MODELS[1:], title="as a multiple of Zipper")
    for row in record["rows"]:
        for what in row["ratio_to_zipper"][MODELS[1]]:
            cells = [f"{row['ratio_to_zipper'][n][what]:.2f}" for n in MODELS[1:]]
            table.add_row(str(row["batch"]), str(row["units"]), what, *cells)
    Console().print(table)
    print(as_json(record))


if __name__ == "__main__":
    main()
