"""A step that a device has no memory for ends with what would fit. Memory that runs out is played here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_recipes import tiny_recipe
from tiny_steps import DOCUMENTS, Documents
from transformers import TrainingArguments
from typer.testing import CliRunner

from zipper_lm import ZipperModel
from zipper_lm.cli import app
from zipper_lm.jobs import fuse as fuse_module
from zipper_lm.jobs.fuse import fuse
from zipper_lm.training.memory import OutOfMemory
from zipper_lm.training.trainer import ZipperTrainer

ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it."


def small_device(monkeypatch: pytest.MonkeyPatch, rows: int, checkpointed: int = 0) -> list[int]:
    """From now on a model reads no more rows than these, with checkpoints of activations than those; what it read."""
    forward, read = ZipperModel.forward, []

    def limited(self: ZipperModel, batch: Any, **kwargs: Any) -> Any:
        size = max(len(side["input_ids"]) for side in batch.values())
        read.append(size)
        if self.training and size > (checkpointed if self.is_gradient_checkpointing else rows):
            raise torch.OutOfMemoryError(ERROR)
        return forward(self, batch, **kwargs)

    monkeypatch.setattr(ZipperModel, "forward", limited)
    return read


@pytest.mark.parametrize(
    ("rows", "checkpointed", "told"),
    [
        (2, 0, "training.batch_size 2 with training.arguments.gradient_accumulation_steps 4"),
        (1, 4, "gradient_accumulation_steps 8; the same batch with training.arguments.gradient_checkpointing true"),
        (0, 1, "batch: one row at a time with training.arguments.gradient_checkpointing true"),
        (0, 0, "batch: nothing, not one row: freeze towers"),
    ],
)
def test_what_would_fit_is_tried(
    rows: int, checkpointed: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(gate=0.5)
    how = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    read = small_device(monkeypatch, rows, checkpointed)
    trainer = ZipperTrainer(model, how, Documents(DOCUMENTS * 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OutOfMemory) as error:
        trainer.train()
    assert "out of memory on cpu in step 1, with 4 rows" in str(error.value)
    assert "Tried to allocate 2.00 GiB. What would fit" in str(error.value)
    assert told in str(error.value)
    assert read[:2] == [4, 2]
    assert not model.is_gradient_checkpointing
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_fusion_says_what_would_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended in a traceback of torch."""
    small_device(monkeypatch, rows=2)
    with pytest.raises(OutOfMemory, match=r"training\.batch_size 2 .*not tried: training\.prefix_cache disk"):
        fuse(tiny_recipe(tmp_path / "m"))


def test_elsewhere_it_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While labels or scores are written, for instance."""

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError(ERROR)

    monkeypatch.setattr(fuse_module, "check", fail)
    (tmp_path / "r.yaml").write_text("{towers: {text: t, speech: s}, data: d, tasks: {speech->text: 1}, output: o}")
    result = CliRunner().invoke(app, ["fuse", str(tmp_path / "r.yaml")])
    assert result.exit_code == 2, result.output
    assert result.stderr.strip() == "error: CUDA out of memory. Tried to allocate 2.00 GiB. More of it."
