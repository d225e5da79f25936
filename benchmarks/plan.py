"""What `zipper plan` says: of a large fusion on 8, 64 and 512 GPUs, and beside a step that was measured on a GPU.

python benchmarks/plan.py docs/runs/plan.json

The fusion is `benchmarks/planned.yaml`, on H100s, by the assumptions of `zipper plan` alone: it was never run. The step
is that of `benchmarks/cost.py --size large`, whose record on an H200 says how long it took; its operations are counted
here, without a GPU and without weights. From its shortest batch comes how long a host takes to launch an operation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common.record import begun, finish
from transformers.utils import logging

from zipper_lm.jobs.cost.devices import DEVICES
from zipper_lm.jobs.cost.plan import plan
from zipper_lm.jobs.recipes.reader import build, read_recipe
from zipper_lm.jobs.recipes.schema import FuseRecipe

HERE = Path(__file__).parent
MEASURED = HERE.parent / "docs" / "runs" / "cost-large-gpu.json"
LENGTHS = {"text": 60, "speech": 250}
PROCESSES = (1, 8, 64, 512)


def tower(width: int, layers: int, heads: int, codec: dict[str, Any], train: str, **more: Any) -> dict[str, Any]:
    """A Llama that is not there yet, as `benchmarks/cost.py` makes one."""
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 4096}
    backbone = {"model_type": "llama", **sizes, **attention, **more}
    return {"source": "nowhere", "train": train, "pretrain": {"codec": codec, "backbone": backbone}}


def measured_fusion(batch: int) -> FuseRecipe:
    """That of `benchmarks/cost.py --size large`."""
    text = tower(2048, 16, 16, {"kind": "text", "options": {"vocab_size": 32000}}, "frozen", dtype="bfloat16")
    speech = tower(1024, 24, 8, {"kind": "speech", "options": {"units": 512}}, "full")
    training = {"batch_size": batch, "arguments": {"bf16": True}}
    plain = {"towers": {"text": text, "speech": speech}, "data": "nowhere", "output": "nowhere", "training": training}
    return build(FuseRecipe, {**plain, "tasks": {"speech->text": 1, "text->speech": 1}, "zips": [{"layers": 4}]})


def beside_measured(row: dict[str, Any]) -> dict[str, Any]:
    """A batch of the record: what was measured, and what is said of it."""
    batch, units = row["batch"], row["units"]
    lengths = {"speech": units, "text": units // 4}
    told = plan(measured_fusion(batch), lambda dtypes: DEVICES["h200"], lengths=lengths, ways=False)
    seconds = row["milliseconds"]["zipper"]["training step"] / 1e3
    return {
        "batch": batch,
        "units": units,
        "seconds": {"measured": seconds, "said": told["time"]["step"]},
        "flops": told["flops"]["step"],
        "calls": told["flops"]["calls"],
        "microseconds_a_call": 1e6 * seconds / told["flops"]["calls"],
        "share_of_peak": told["flops"]["step"] / seconds / DEVICES["h200"].peak["bfloat16"],
    }


def main() -> None:
    """Count and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--recipe", type=Path, default=HERE / "planned.yaml")
    given = parser.parse_args()
    logging.set_verbosity_error()
    record = begun(recipe=given.recipe.name)
    device = DEVICES["h100"]
    record["plan"] = plan(
        read_recipe(given.recipe), lambda dtypes: device, lengths=LENGTHS, processes=PROCESSES, ways=False
    )
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    record["measured"] = [beside_measured(row) for row in rows]
    finish(record, given.output)


if __name__ == "__main__":
    main()
