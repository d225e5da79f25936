"""What a written token costs, beside other decoders that read something: ours and peers of the same shape take turns.

python benchmarks/decode.py docs/runs/decode-small.json [--size small|135m|1b] [--batch 1 8] [--quick]
python benchmarks/decode.py docs/runs/decode-135m.json --size 135m --only plain bare 'bare, static and compiled'

Everyone has the same text tower (random weights), as many layers of cross-attention, and as many tokens of memory, and
writes greedily as many tokens as it is told. What is measured is each further token: a turn with many tokens, less a
turn with one. Who cannot run here says why. The record is written anew after every part, and is the last line of the
output.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.record import begun, busy, finish, keep
from common.turns import ratio, turns
from decoding.deep_fusion import deep_fusion
from decoding.ours import Write, engine, fused, plain, single_decoder, two_towers
from decoding.peers import bare, mllama
from decoding.sizes import SIZES, Size
from transformers.utils import logging

from zipper_lm import ZipperModel
from zipper_lm.evaluation.cost import token_cost
from zipper_lm.generation.engine.weights import Form

PLAIN, BARE, LOOP, ENGINE = "plain", "bare", "two towers, nothing kept", "engine"


def writers(size: Size, batch: int) -> dict[str, Callable[[], Write]]:
    """Who writes, by name, not made yet."""
    given = size.documents(batch)
    model = fused(size)
    # In fewer bytes weights are read faster by a CPU; on a GPU minutes are few.
    forms: tuple[Form, ...] = ("bf16", "int8") if model.device.type == "cpu" else ()
    return {
        PLAIN: partial(plain, model, given),
        "plain, with feed-forward": lambda: plain(fused(size, feed_forward=True), given),
        ENGINE: partial(engine, model, given, compiled=True),
        "engine, not compiled": partial(engine, model, given, compiled=False),
        **{f"engine, {form}": partial(engine, model, given, compiled=True, weights=form) for form in forms},
        BARE: partial(bare, size, batch, compiled=False),
        "bare, static and compiled": partial(bare, size, batch, compiled=True),
        "single decoder": partial(single_decoder, size, given),
        "Mllama": partial(mllama, size, batch, compiled=False),
        "Mllama, static and compiled": partial(mllama, size, batch, compiled=True),
        "DeepFusion": partial(deep_fusion, size, batch, compiled=False),
        "DeepFusion, compiled": partial(deep_fusion, size, batch, compiled=True),
        LOOP: partial(two_towers, model, given),
    }


def further_tokens(works: Mapping[str, Write], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each further token, in every turn."""
    most = {name: min(tokens, 9) if name == LOOP else tokens for name in works}  # it would take all the time
    # The long one first: what is compiled and kept for it serves the short one.
    taken = turns({(name, n): partial(write, n) for name, write in works.items() for n in (most[name], 1)}, repeats)
    return {
        name: [(long - short) / (n - 1) for long, short in zip(taken[name, n], taken[name, 1])]
        for name, n in most.items()
    }


def ready(
    makers: Mapping[str, Callable[[], Write]], batch: int, tokens: int
) -> tuple[dict[str, Write], dict[str, Any]]:
    """Those who can write, tried once, and why the others cannot."""
    able: dict[str, Write] = {}
    unable: dict[str, Any] = {}
    for name, make in makers.items():
        try:
            write = make()
            rows = write(tokens)
        except Exception as error:  # a peer that does not go together with this torch is no reason to stop
            if name in (PLAIN, BARE):
                raise
            unable[name] = {"not_run": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}
            print(f"{name}: {unable[name]['not_run']}", file=sys.stderr)
            continue
        assert [len(row) for row in rows] == [tokens] * batch, f"{name} wrote another number of tokens"
        able[name] = write
    return able, unable


def part(size: Size, batch: int, only: list[str] | None, repeats: int, reading: dict[str, Any]) -> dict[str, Any]:
    """Everyone at one batch size."""
    makers = {n: m for n, m in writers(size, batch).items() if only is None or n in only}
    able, unable = ready(makers, batch, size.tokens)
    same = None
    if size.dtype == torch.float32 and {PLAIN, LOOP} <= set(able):
        few = min(size.tokens, 9)
        same = able[PLAIN](few) == able[LOOP](few)
    times = further_tokens(able, size.tokens, repeats)
    rows: dict[str, Any] = {}
    for name, taken in times.items():
        rows[name] = {
            "tokens_a_second": round(batch / statistics.median(taken), 2),
            **{f"time_to_{to}": ratio(taken, times[to]) for to in (PLAIN, BARE) if to in times},
        }
    if batch == 1 and PLAIN in rows:
        bytes_a_second = reading["weights_a_token_mib"] * 2**20 / statistics.median(times[PLAIN])
        rows[PLAIN]["share_of_bandwidth"] = round(bytes_a_second / 1e9 / reading["copy_gb_a_second"], 4)
    return {"batch": batch, "load": busy(), "two_towers_write_what_plain_does": same, "writers": rows | unable}


def bandwidth(model: ZipperModel, size: Size) -> dict[str, Any]:
    """What a token must read of the weights, and how fast this device copies."""
    cost = token_cost(model, "text")
    entries = cost.backbone + cost.input_projection + sum(z.step for z in cost.zips.values())
    source = torch.ones(256 << 20, dtype=torch.uint8, device=model.device)  # an empty one may lie nowhere
    target = torch.empty_like(source)
    taken = turns({"copy": lambda: target.copy_(source)}, 5)["copy"]
    read = round(2 * source.nbytes / statistics.median(taken) / 1e9, 2)
    mib = round(entries * size.dtype.itemsize / 2**20, 1)
    return {"weights_a_token_mib": mib, "copy_gb_a_second": read}


def main() -> None:
    """Measure part by part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="these writers; without it, all")
    parser.add_argument("--quick", action="store_true", help="one turn")
    given = parser.parse_args()
    logging.set_verbosity_error()
    size = SIZES[given.size]
    if given.only and (unknown := set(given.only) - set(writers(SIZES["tiny"], 1))):
        parser.error(f"--only: no writer {sorted(unknown)}; there are {list(writers(SIZES['tiny'], 1))}")
    record = begun(
        benchmark="decode",
        size=given.size,
        dtype=str(size.dtype).removeprefix("torch."),
        memory=size.memory,
        tokens=size.tokens,
        repeats=1 if given.quick else given.repeats,
        threads_of_openmp=os.environ.get("OMP_NUM_THREADS"),
        parts=[],
    )
    record |= (reading := bandwidth(fused(size), size))
    for batch in given.batch:
        record["parts"].append(part(size, batch, given.only, record["repeats"], reading))
        keep(record, given.output)
        print(f"batch {batch}: done", file=sys.stderr)
    finish(record, given.output)


if __name__ == "__main__":
    main()
