"""What makes training repeatable, and what it leaves on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_model
from tiny_steps import DOCUMENTS, Documents
from transformers import TrainingArguments

from zipper_lm.training.trainer import ZipperTrainer


def test_a_checkpoint_in_training_has_no_card(tmp_path: Path) -> None:
    trainer = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda model: model), model=tiny_model())
    trainer.spelling, trainer.args = None, SimpleNamespace(should_save=True)
    ZipperTrainer._save(trainer, str(tmp_path / "checkpoint"))  # type: ignore[arg-type]
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()
    assert not list((tmp_path / "checkpoint").glob("*.md"))


def test_of_several_processes_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With DDP all of them wrote the weights of a checkpoint, into one folder: one that was killed meanwhile left the
    others' half undone."""
    how = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
    trainer = ZipperTrainer(tiny_model(), how, Documents(DOCUMENTS))
    monkeypatch.setattr(TrainingArguments, "should_save", False)
    trainer.save_model(str(tmp_path / "c"))
    assert not (tmp_path / "c").exists()
