"""What makes training repeatable, and what it leaves on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from tiny import tiny_model

from zipper_lm.training.trainer import ZipperTrainer


def test_a_checkpoint_in_training_has_no_card(tmp_path: Path) -> None:
    trainer = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda model: model), model=tiny_model())
    trainer.spelling = None
    ZipperTrainer._save(trainer, str(tmp_path / "checkpoint"))  # type: ignore[arg-type]
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()
    assert not list((tmp_path / "checkpoint").glob("*.md"))
