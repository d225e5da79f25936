"""What makes training repeatable, and what it leaves on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
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


def test_a_frozen_tower_misreads_its_history_where_it_is_named(tmp_path: Path) -> None:
    """One share for all spares it; its weights stay as they are."""

    def losses(history_dropout: float | dict[str, float]) -> list[float]:
        model: Any = tiny_model(gate=0.3)
        before = {name: p.clone() for name, p in model.tower("text").named_parameters()}
        how = TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        )
        trainer = ZipperTrainer(model, how, Documents(DOCUMENTS), history_dropout=history_dropout)
        trainer.train()
        assert all(torch.equal(p, before[name]) for name, p in model.tower("text").named_parameters())
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    plain = losses(0.0)
    assert losses(0.9) == losses({"speech": 0.0}) == plain
    assert len({tuple(plain), tuple(losses({"text": 0.9})), tuple(losses({"speech": 0.9}))}) == 3
