"""Training in several processes, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_recipes import plain_recipe, workshop

from zipper_lm.evaluation.preservation import verify
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.utils.processes import _of_connection, any_of, from_main, is_main, made_by_main, several


def test_alone_nothing_is_waited_for() -> None:
    assert is_main()
    assert not several()
    assert any_of(True)
    assert not any_of(False)
    assert from_main(3) == 3
    with pytest.raises(ValueError, match="too few"):
        made_by_main(lambda: (_ for _ in ()).throw(ValueError("too few")))


@pytest.mark.parametrize(
    ("told", "lost"),
    [
        ("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5001", True),
        ("Application timeout caused pair closure", True),  # no word of gloo: a process that hung was a traceback
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_an_error_of_a_connection_is_known(told: str, lost: bool) -> None:
    assert _of_connection(RuntimeError(told)) is lost


def launch(*words: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    return subprocess.run(
        [*launcher, "-m", "zipper_lm", *map(str, words)], capture_output=True, text=True, env=environment, timeout=300
    )


def test_two_processes_train_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes used to make towers, train and write each for itself, into the same places.

    They must end with one whole model whose frozen tower is untouched, say so once, and have seen twice the documents.
    Each computes its share of what is kept of the frozen tower, and reads the other's: one took files that the other
    had just written for older ones, and computed a share of the rest only.
    """
    monkeypatch.setenv("ZIPPER_CACHE", str(tmp_path / "cache"))
    text = {
        "source": str(tmp_path / "text"),
        "input_projection_layer": 1,
        "pretrain": {
            "codec": {"kind": "text", "options": {"vocab_size": 32}},
            "backbone": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            "training": {"steps": 2, "batch_size": 2},
        },
    }
    towers = {"text": text, "speech": {"source": str(workshop() / "speech"), "train": "full"}}
    plain = plain_recipe(
        tmp_path / "model", towers=towers, training={"steps": 4, "evaluate_every": 2, "prefix_cache": "disk"}
    )
    plain["training"]["arguments"] |= {"use_cpu": True}
    (tmp_path / "recipe.yaml").write_text(json.dumps(plain))
    done = launch("fuse", tmp_path / "recipe.yaml", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["steps"] == 4
    record = json.loads((tmp_path / "model" / "run.json").read_text())
    assert record["frozen_unchanged"] == {"text": True}
    assert {entry["prefix_cache/text"] for entry in record["history"] if "loss" in entry} == {1.0}
    assert len(list((tmp_path / "cache" / "prefixes").rglob("*.safetensors"))) == 2
    epochs = [entry["epoch"] for entry in record["history"] if "loss" in entry]
    assert epochs[-1] == pytest.approx(4 * 4 * 2 / 12, abs=0.7), "four steps of four documents in two processes"
    model = ZipperModel.from_pretrained(tmp_path / "model")
    assert all(report.identical for report in verify(model) if report.train == "frozen")
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not (tmp_path / "model.training").exists()
    refused = launch("fuse", tmp_path / "recipe.yaml")
    assert refused.returncode != 0
    assert "exists" in refused.stderr
