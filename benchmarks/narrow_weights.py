"""What fewer bytes for the weights of a frozen tower cost: perplexity of a language model, and errors in reading.

python benchmarks/narrow_weights.py docs/runs/narrow-weights.json --llm FOLDER --texts FILE --model zipper-demo/model

- `perplexity`: of `--llm`, a causal language model (a folder, or an id on the Hub), on the first tokens of `--texts`, a
  text file, 512 at a time.
- `reading`: word error rate of `--model`, as `make demo` leaves it, on the demo's test utterances, its text tower
  written with by an engine.

Each with the weights as they are, in bfloat16 and in int8. The record is the last line of the output.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
from pathlib import Path
from typing import Any, get_args

import torch
from common.record import begun, finish, keep
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from zipper_lm import Document, Engine, Segment, ZipperModel
from zipper_lm.demo.corpus import render
from zipper_lm.demo.sizes import DemoSizes
from zipper_lm.evaluation.word_error_rate import paired_interval, word_error_rate
from zipper_lm.generation.engine.weights import Form, weights_as

FORMS: tuple[Form | None, ...] = (None, *get_args(Form))
WINDOW, TOKENS = 512, 8192


def named(form: Form | None) -> str:
    """In the record."""
    return form or "as they are"


@torch.no_grad()
def perplexity(llm: str, texts: Path) -> dict[str, Any]:
    """Of one model with each form of weights."""
    whole = texts.read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(llm)(whole, return_tensors="pt").input_ids[:, : TOKENS + 1]
    found = {}
    for form in FORMS:
        narrow = weights_as(copy.deepcopy(model), form)
        total = 0.0
        for begin in range(0, ids.shape[1] - 1, WINDOW):
            part = ids[:, begin : begin + WINDOW + 1]
            logits = narrow(input_ids=part[:, :-1]).logits[0].float()
            total += float(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum"))
        found[named(form)] = round(math.exp(total / (ids.shape[1] - 1)), 4)
    return {
        "model": Path(llm).name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": ids.shape[1] - 1,
        "texts_sha256": hashlib.sha256(whole.encode()).hexdigest(),
        "perplexity": found,
    }


def spoken(model: ZipperModel, sizes: DemoSizes) -> tuple[list[str], list[Document]]:
    """The demo's test utterances: what is said, and documents of their sounds."""
    assert model.processor is not None
    utterances = sizes.corpus().test
    ids = model.processor.codecs["speech"].encode(list(render(utterances)))
    return [u.text for u in utterances], [Document([Segment("speech", ids=row)]) for row in ids]


def reading(folder: Path) -> dict[str, Any]:
    """Word error rates of one model with each form of weights."""
    sizes = DemoSizes()
    model = ZipperModel.from_pretrained(folder).eval()
    said, documents = spoken(model, sizes)
    heard: dict[str, list[str]] = {}
    for form in FORMS:
        with Engine(model, slots=16, compile=False, weights=form) as engine:
            written = model.generate(documents, ["text"], settings=sizes.generation, engine=engine)
            heard[named(form)] = [str(document[-1].value) for document in written]
    plain = heard[named(None)]
    return {
        "utterances": len(said),
        "wer": {name: round(word_error_rate(said, texts).wer, 2) for name, texts in heard.items()},
        "same_text": {name: sum(a == b for a, b in zip(texts, plain)) for name, texts in heard.items()},
        "difference_and_95": {
            name: [round(points, 2) for points in paired_interval(said, [texts], [plain])]
            for name, texts in heard.items()
            if texts is not plain
        },
    }


def main() -> None:
    """Measure part by part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--llm", help="with --texts")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    if (given.llm is None) != (given.texts is None):
        parser.error("--llm and --texts go together")
    logging.set_verbosity_error()
    record = begun(benchmark="narrow_weights")
    if given.llm is not None:
        record["perplexity"] = perplexity(given.llm, given.texts)
        keep(record, given.output)
    if given.model is not None:
        record["reading"] = reading(given.model)
    finish(record, given.output)


if __name__ == "__main__":
    main()
