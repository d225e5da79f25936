"""What is left of a command that is ended from outside: by a signal, or by a full disk."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_experiment import plan
from tiny_recipes import plain_recipe
from transformers import Trainer
from typer.testing import CliRunner, Result

from zipper_lm.cli import app
from zipper_lm.jobs import prepare as prepare_module
from zipper_lm.utils import disk, files


def zipper(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def command(name: str, folder: Path) -> list[object]:
    """A long command, small, that writes ``out`` in a folder."""
    if name == "experiment":
        return [name, plan(folder), "--results", folder / "out", "--work", folder / "work"]
    recipe = plain_recipe(folder / "out", training={"steps": 3, "save_every": 1})
    if name == "pretrain":
        recipe = {key: recipe[key] for key in ("data", "training", "output")} | {
            "modality": "text",
            "codec": {"kind": "text", "options": {"vocab_size": 32}},
            "backbone": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return [name, folder / "recipe.yaml", *(["--output", folder / "out"] if name == "prepare" else [])]


def killed_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """SIGTERM while the given step is being computed."""
    real = Trainer.training_step

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    patch.setattr(Trainer, "training_step", training_step)


@pytest.mark.parametrize("name", ["fuse", "pretrain"])
def test_sigterm_in_training_leaves_a_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch systems send it before they kill: it ended training at once, with the work since the last checkpoint."""
    words = [*command(name, tmp_path), "training.save_every=null"]
    with monkeypatch.context() as patch:
        killed_at(2, patch)
        result = zipper(*words)
    assert result.exit_code == 128 + signal.SIGTERM
    assert "interrupted: stopped after step 2; go on with resume (--resume)" in result.stderr
    assert [p.name for p in (tmp_path / "out.training").glob("checkpoint-*")] == ["checkpoint-2"]
    assert zipper(*words, "--resume").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_sigterm_while_encoding_keeps_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command("prepare", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_finish", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        result = zipper(*words)
    assert result.exit_code == 128 + signal.SIGTERM
    assert "keeps the whole shards; go on with resume" in result.stderr
    assert zipper(*words, "--resume").exit_code == 0


def test_sigterm_ends_an_experiment_between_steps_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it comes, what is under way is cleared up, as after Ctrl-C."""
    words = command("experiment", tmp_path)
    monkeypatch.setattr(files, "_flush", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert zipper(*words).exit_code == 128 + signal.SIGTERM
    assert not (tmp_path / "out").exists()


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def one_line(result: Result) -> None:
    """It says that the disk is full, and nothing else."""
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "No space left on device" in errors[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["fuse", "pretrain", "prepare", "experiment"])
@pytest.mark.parametrize("when", ["at first", "at last"])
def test_a_full_disk_is_one_line(name: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems tell only when a file is flushed."""
    words = command(name, tmp_path)
    if when == "at last" and name == "experiment":
        words += ["--only", "single--all--seed1"]
    flush = files._flush

    def flushed(file: Path) -> None:
        # What is written last: a model, a tower, prepared data, the record of a run.
        if when == "at first" or file.name in ("run.json", "prepared.json", "generation_config.json", "plan.jsonl"):
            full()
        flush(file)

    monkeypatch.setattr(files, "_flush", flushed)
    one_line(zipper(*words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fuse", "pretrain"])
def test_a_checkpoint_that_finds_no_space(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's writer raises an error of its own, which does not say why; the user saw a traceback, and the half of a
    checkpoint filled the disk further."""
    words, save = command(name, tmp_path), torch.save

    def saved(content: Any, file: Any, *_: Any, **__: Any) -> None:
        if "checkpoint-2" in str(file):
            Path(file).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        save(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", saved)
        patch.setattr(disk, "_has_space", lambda _: False)
        one_line(zipper(*words))
    assert [p.name for p in (tmp_path / "out.training").glob("checkpoint-*")] == ["checkpoint-1"]
    assert zipper(*words, "--resume").exit_code == 0


def test_logs_that_find_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard writes from a thread of its own, whose traceback came before everything else."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    words = command("fuse", tmp_path)
    monkeypatch.setattr(RecordWriter, "write", full)
    one_line(zipper(*words))
