"""`zipper fuse`, `evaluate` and `verify` by `torchrun`: models that are spread over two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_recipes import plain_recipe, workshop

from zipper_lm.data.sources.readers import read_rows
from zipper_lm.evaluation.judges import load_judge
from zipper_lm.evaluation.scoring import score_task
from zipper_lm.models.load import load

STEPS = 30
SECONDS = 600


def launched(*words: object, processes: int = 2) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, "-m", "zipper_lm", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a command that ends well says on standard output: one line, by one process."""
    out, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, told[-3000:]
    (line,) = out.splitlines()
    return json.loads(line)


@pytest.mark.slow
def test_a_model_that_is_spread_is_fused_interrupted_gone_on_with_scored_and_verified(tmp_path: Path) -> None:
    """On CPUs accelerate held whole models in each process, so that nothing of this could be run as a user does; and
    processes on a machine without GPUs did not know of each other."""

    def recipe(name: str) -> Path:
        training = {"steps": STEPS, "evaluate_every": 10, "arguments": {"fsdp": True, "disable_tqdm": True}}
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(plain_recipe(tmp_path / name, training=training)))
        return file

    done = ended(launched("fuse", recipe("whole"), "--json"))
    assert done["steps"] == STEPS
    assert done["frozen_unchanged"] == {"text": True}
    begun = launched("fuse", recipe("halved"))
    working, end = tmp_path / "halved.training", time.monotonic() + SECONDS
    while not (working / "checkpoint-10" / "trainer_state.json").exists():
        assert begun.poll() is None, begun.communicate()[1][-3000:]
        assert time.monotonic() < end
        time.sleep(0.05)
    begun.send_signal(signal.SIGTERM)  # as Slurm does
    _, told = begun.communicate(timeout=SECONDS)
    assert begun.returncode != 0
    assert not (tmp_path / "halved").exists(), told[-3000:]
    files = {file.name for each in working.glob("checkpoint-*") for file in each.iterdir()}
    assert {"model.safetensors", "optimizer.bin"} <= files
    ended(launched("fuse", recipe("halved"), "--resume", "--json"))
    whole, halved = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halved"))
    assert whole.keys() == halved.keys()
    assert all(bool((halved[name] == tensor).all()) for name, tensor in whole.items())
    assert not working.exists()

    assert ended(launched("verify", tmp_path / "whole", "--json"))["identical"]
    data, judge = workshop() / "data", workshop() / "judge"
    how = ("--task", "tts", "--split", "train", "--judge", judge, "--json", "--output", tmp_path / "heard")
    scored = ended(launched("evaluate", tmp_path / "whole", data, *how))
    alone = score_task(load(tmp_path / "whole"), read_rows(str(data), split="train"), "tts", judge=load_judge(judge))
    assert {key: scored[key] for key in ("wer", "cer", "utterances")} == {
        key: alone.summary()[key] for key in ("wer", "cer", "utterances")
    }
    assert len(list((tmp_path / "heard").glob("*.wav"))) == 12
