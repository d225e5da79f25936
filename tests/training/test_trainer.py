"""What makes training repeatable, and what it leaves on disk."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tiny import tiny_model

from zipper_lm.training.base import randomness_kept
from zipper_lm.training.trainer import ZipperTrainer


def test_randomness_is_kept() -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = drawn()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    with randomness_kept():
        drawn()
    assert drawn() == expected


def test_a_checkpoint_in_training_has_no_card(tmp_path: Path) -> None:
    trainer = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda model: model), model=tiny_model())
    trainer.spelling = None
    ZipperTrainer._save(trainer, str(tmp_path / "checkpoint"))  # type: ignore[arg-type]
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()
    assert not list((tmp_path / "checkpoint").glob("*.md"))
