"""What makes training repeatable, and what it leaves on disk."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_model

from zipper_lm.jobs.resume import begin, check_working
from zipper_lm.training.trainer import LikeLengths, ZipperTrainer, latest_checkpoint, randomness_kept


def test_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 50, 64).tolist()
    sampler = LikeLengths(lengths, 4, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(64))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    spread = np.mean([np.ptp([lengths[i] for i in first[k : k + 4]]) for k in range(0, 64, 4)])
    assert spread < 0.5 * np.mean([np.ptp(lengths[k : k + 4]) for k in range(0, 64, 4)])


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


def test_a_checkpoint_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step, whole in ((5, True), (20, True), (100, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-20"


def test_a_working_folder_knows_its_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "m.training"
    begin(folder, {"seed": 1, "overwrite": False})
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "trainer_state.json").write_text("{}")
    same = {"seed": 1, "overwrite": True}
    assert check_working(folder, same, resume=True, overwrite=False) == folder / "checkpoint-5"
    with pytest.raises(ValueError, match="'seed'"):
        check_working(folder, {"seed": 2}, resume=True, overwrite=False)
    with pytest.raises(ValueError, match="checkpoint-5"):
        check_working(folder, same, resume=False, overwrite=False)
    assert check_working(folder, same, resume=False, overwrite=True) is None
    begin(folder, same)
    assert latest_checkpoint(folder) is None


def test_a_checkpoint_in_training_has_no_card(tmp_path: Path) -> None:
    trainer = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda model: model), model=tiny_model())
    ZipperTrainer._save(trainer, str(tmp_path / "checkpoint"))  # type: ignore[arg-type]
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file()
    assert not list((tmp_path / "checkpoint").glob("*.md"))
