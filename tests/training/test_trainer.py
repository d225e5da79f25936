"""What makes training repeatable: corruption and order are functions of seed, epoch and index."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_model

from zipper_lm import Document, Segment
from zipper_lm.data.collation import IGNORED, Specials, collate
from zipper_lm.jobs.resume import begin, check_working
from zipper_lm.training.trainer import (
    CorruptedDocuments,
    LikeLengths,
    ZipperTrainer,
    check_precision,
    latest_checkpoint,
    randomness_kept,
)

SPECIALS = {"text": Specials(0, 1, 2), "speech": Specials(0, 1, 2)}


def noisy(corrupt: float | dict[str, float] = 0.0, history_dropout: float = 0.0) -> CorruptedDocuments:
    given, target = list(range(10, 50)), list(range(50, 90))
    documents = [
        Document([Segment("speech", ids=given), Segment("text", ids=target, target=True), Segment("text", ids=[5, 6])])
        for _ in range(3)
    ]
    return CorruptedDocuments(
        documents,  # type: ignore[arg-type]
        SPECIALS,
        corrupt=corrupt,
        history_dropout=history_dropout,
        sizes={"text": 100, "speech": 100},
        seed=1,
    )


def test_corruption_hits_given_segments_only_and_can_be_repeated() -> None:
    data = noisy(corrupt=0.5)
    first = data[0]
    lost = sum(i == 2 for i in first[0].ids or [])
    assert 5 < lost < 35
    assert first[1].ids == list(range(50, 90))
    assert first[2].ids == [5, 6]  # too short to lose anything
    assert data[0][0].ids == first[0].ids != data[1][0].ids
    data.set_epoch(1)
    assert data[0][0].ids != first[0].ids
    data.set_epoch(0)
    assert data[0][0].ids == first[0].ids
    assert noisy()[0][0].ids == list(range(10, 50))
    assert noisy({"speech": 0.5})[0][0].ids == first[0].ids
    assert noisy({"text": 0.5})[0][0].ids == list(range(10, 50))


def test_history_dropout_changes_what_a_target_reads_not_what_it_shall_write() -> None:
    data, whole = noisy(history_dropout=0.5), list(range(50, 90))
    first = data[0]
    assert first[0].ids == list(range(10, 50))
    assert first[1].labels == whole
    assert 5 < sum(a != b for a, b in zip(first[1].ids or [], whole)) < 35
    assert not set(first[1].ids or []) & set(SPECIALS["text"])
    assert data[0][1].ids == first[1].ids != data[1][1].ids
    stream = collate([first], SPECIALS)["text"]
    assert stream["labels"][0, :43].tolist() == [IGNORED, *whole, SPECIALS["text"].eos, IGNORED]
    assert stream["input_ids"][0, 1:41].tolist() == first[1].ids


def test_a_frozen_towers_history_is_spared() -> None:
    """It cannot learn to cope: with 30 % of its letters wrong, a frozen text tower read worse than it did untrained."""
    data = noisy(history_dropout=0.5)
    del data.sizes["text"]
    assert data[0][1].ids == list(range(50, 90))
    assert data[0][1].labels is None


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


def test_half_precision_that_is_trained_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A loaded model may have any dtype: nothing said that bfloat16 weights hardly move."""
    model = tiny_model()
    model.tower("text").backbone.to(torch.float16)  # frozen
    with caplog.at_level(logging.WARNING):
        check_precision(model)
    assert not caplog.records
    model.zips.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        check_precision(model)
    assert "zips." in caplog.text
    assert "bfloat16, in which small updates are lost" in caplog.text
    with pytest.raises(ValueError, match=r"training: \w+ is float16, whose range is too narrow .*float32"):
        check_precision(model.half())
