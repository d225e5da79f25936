"""Training that diverges stops before it spoils anything, and a resumed run is the run."""

from __future__ import annotations

import json
import logging
import os
import signal
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_recipes import tiny_recipe, workshop
from tiny_steps import DOCUMENTS, Documents, free_port, resume_in_a_process
from torch.utils.data import get_worker_info
from transformers import Trainer, TrainerCallback, TrainingArguments

from zipper_lm import Segment, ZipSpec
from zipper_lm.data.document import Document
from zipper_lm.evaluation.preservation import from_loss
from zipper_lm.jobs import fuse as fuse_module
from zipper_lm.jobs import record as record_module
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.pretrain import pretrain
from zipper_lm.jobs.recipes.reader import build
from zipper_lm.jobs.recipes.schema import PretrainRecipe
from zipper_lm.jobs.validation import Scorer
from zipper_lm.training.base import Diverged, WorkerLost
from zipper_lm.training.trainer import ZipperTrainer

QUIET: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 2}
EIGHT = [*DOCUMENTS, *(Document([*d, Segment("text", ids=[7] * n)]) for n, d in enumerate(DOCUMENTS, 3))]


class _Spoiled(ZipperTrainer):
    """The loss is no number from the step `at` on."""

    at = 3

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * (float("nan") if self.state.global_step + 1 >= self.at else 1.0)


def test_a_step_that_would_spoil_the_weights_is_not_taken(tmp_path: Path) -> None:
    """A loss that was no number made all weights none, training went on to the end, and the command ended well."""
    model = tiny_model(gate=0.5)
    given = TrainingArguments(str(tmp_path), max_steps=5, save_steps=2, gradient_accumulation_steps=2, **QUIET)
    documents = Documents(EIGHT)
    trainer = _Spoiled(model, given, documents)
    documents.read = []
    with pytest.raises(Diverged, match="diverged at step 3, which was not taken: the loss is nan") as told:
        trainer.train()
    assert trainer.state.global_step == 2
    kept = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(kept[n], p) for n, p in model.state_dict().items() if n in kept)
    # In each epoch all are read for their lengths first.
    assert f"documents {sorted(documents.read[24:28])} of 8" in str(told.value)
    assert "loss_" not in str(told.value)
    for part in ("text ", "learning rate 3e-05", "the gradient's norm nan", str(tmp_path / "checkpoint-2"), "Try a l"):
        assert part in str(told.value)


def test_a_rate_that_is_too_high_ends_the_run_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    training = {"steps": 30, "learning_rate": 1e20, "tower_learning_rate": 1e20, "save_every": 1}
    with pytest.raises(Diverged, match=r"learning rate 1e\+20; documents \[.*checkpoint-\d+\. Try"):
        fuse(tiny_recipe(tmp_path / "m", training=training))
    assert not (tmp_path / "m").exists()
    (newest, *_) = sorted((tmp_path / "m.training").glob("checkpoint-*"))[::-1]
    assert all(t.isfinite().all() for t in load_file(newest / "model.safetensors").values())


def test_so_does_a_tower_alone(tmp_path: Path) -> None:
    recipe = {
        "data": str(workshop() / "data"),
        "modality": "text",
        "backbone": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "training": {"steps": 30, "batch_size": 2, "learning_rate": 1e25, "arguments": {"disable_tqdm": True}},
        "output": str(tmp_path / "t"),
    }
    with pytest.raises(Diverged, match=r"\d streams of \d+ to \d+ tokens; there is no checkpoint yet"):
        pretrain(build(PretrainRecipe, recipe))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(("scale", "stops"), [(None, True), (2.0**16, False), (0.5, True)])
def test_a_step_that_the_loss_scaler_will_skip_is_none(
    scale: float | None, stops: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overflow in float16 is how the scaler finds its scale; at a scale below one it has none to find."""
    trainer = ZipperTrainer(tiny_model(), TrainingArguments(str(tmp_path), **QUIET), Documents(DOCUMENTS))
    trainer.create_optimizer_and_scheduler(3)
    trainer.callback_handler.train_dataloader = trainer.get_train_dataloader()
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda *_: torch.tensor(torch.inf))
    scaler = None if scale is None else SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: scale)
    monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    for loss, ends in ((1.0, stops), (torch.inf, True)):
        trainer._step_losses = [torch.tensor(loss)]
        if ends:
            with pytest.raises(Diverged, match="norm inf"):
                trainer._get_grad_norm(trainer.model)
        else:
            assert trainer._get_grad_norm(trainer.model) == torch.inf


def run(folder: Path, resume: bool = False, **more: Any) -> tuple[list[dict[str, float]], float, dict[str, Any]]:
    """Nine steps with dropout, four an epoch, and a checkpoint in the midst of the second; its losses and weights."""
    zips = ZipSpec(gate_start=0.5, layers=3, dropout=0.3)
    model = tiny_model(gate=0.5, kinds={"speech": "qwen3"}, zips=zips, train={"speech": "full"})
    given = TrainingArguments(
        str(folder), max_steps=9, save_steps=5, logging_steps=2, learning_rate=1e-3, **QUIET | more
    )
    torch.manual_seed(0)
    trainer = ZipperTrainer(model, given, Documents(EIGHT), corrupt=0.2, history_dropout=0.3)
    result = trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5") if resume else None)
    history = [{k: v for k, v in e.items() if "loss" in k or k == "step"} for e in trainer.state.log_history]
    return history, result.training_loss, {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_resumed_run_is_the_run(workers: int, persistent: bool, tmp_path: Path) -> None:
    """``train_loss`` of a resumed run was the mean since then, the first line of its log was of the steps since then,
    and workers that outlive an epoch made it draw other dropout from the next epoch on."""
    if persistent and not workers:
        pytest.skip("there are none to outlive it")
    more = {"dataloader_num_workers": workers, "dataloader_persistent_workers": persistent}
    history, loss, weights = run(tmp_path, **more)
    again, loss_again, weights_again = run(tmp_path, resume=True, **more)
    assert again == history
    assert loss_again == loss == pytest.approx(sum(e["loss"] for e in history[:4]) * 2 / 9, rel=0.2)
    assert all(torch.equal(weights_again[n], p) for n, p in weights.items())


@pytest.mark.skipif(version("accelerate") == "1.10.0", reason="puts processes on cpu:0, where torch loads nothing to")
def test_so_it_is_in_two_processes(tmp_path: Path) -> None:
    """Begun in the midst of an epoch, several processes read what is left of the first epoch's order: the sampler lies
    one level deeper than accelerate and Trainer look for it. A tower alone has a sampler that accelerate finds."""
    torch.multiprocessing.spawn(resume_in_a_process, (free_port(), str(tmp_path)), nprocs=2)
    found = json.loads((tmp_path / "0.json").read_text())
    assert [len(whole) for whole, _ in found.values()] == [6, 6]
    assert {name: again == whole for name, (whole, again) in found.items()} == {"fusion": True, "tower": True}


def test_a_second_run_of_a_trainer_counts_its_own_losses(tmp_path: Path) -> None:
    given = TrainingArguments(str(tmp_path), max_steps=2, save_steps=1, learning_rate=0.0, **QUIET)
    trainer = ZipperTrainer(tiny_model(), given, Documents(DOCUMENTS))
    assert trainer.train().training_loss == pytest.approx(trainer.train().training_loss)


def test_perplexity_without_bounds_is_infinite_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """``math.exp`` raised after the last step, and the tower was lost."""
    with caplog.at_level(logging.WARNING):
        assert from_loss("text", 1000.0) == float("inf")
    assert "text: a loss of 1000 nats" in caplog.text


def test_no_checkpoint_holds_what_is_no_json(tmp_path: Path) -> None:
    """A score may be infinite or none; ``NaN`` and ``Infinity`` are no JSON."""
    given = TrainingArguments(str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, save_steps=2, **QUIET)
    score = lambda model: {"loss": float("inf"), "wer": float("nan")}  # noqa: E731
    trainer = ZipperTrainer(tiny_model(), given, Documents(DOCUMENTS), score=score)
    trainer.train()
    text = (tmp_path / "checkpoint-2" / "trainer_state.json").read_text()
    state = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [e["eval_loss"] for e in state["log_history"] if "eval_loss" in e] == [None, None]
    assert trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2")).global_step == 2


def test_the_newest_checkpoints_stay_where_the_clock_was_set_back(tmp_path: Path) -> None:
    """Trainer deletes the ones with the oldest times: after the clock was set back, what it had just written."""

    class SetBack(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for folder in tmp_path.glob("checkpoint-*"):
                os.utime(folder, (1e9 - 100 * int(folder.name[11:]),) * 2)

    how = TrainingArguments(str(tmp_path), max_steps=5, save_steps=1, save_total_limit=2, **QUIET)
    ZipperTrainer(tiny_model(gate=0.5), how, Documents(EIGHT), callbacks=[SetBack()]).train()
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert how.save_total_limit == 2


class _Dying(Documents):
    """Kills the process that reads it."""

    def __getitem__(self, index: int) -> Document:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_process_that_reads_data_and_dies_is_told(tmp_path: Path) -> None:
    """torch's error was a traceback that said neither why nor what to do."""
    how = TrainingArguments(str(tmp_path), max_steps=2, dataloader_num_workers=1, **QUIET)
    with pytest.raises(
        WorkerLost, match=r"died after step 0 \(DataLoader worker \(pid.*--resume.*dataloader_num_workers"
    ):
        ZipperTrainer(tiny_model(gate=0.5), how, _Dying(EIGHT)).train()


@pytest.mark.parametrize("patience", [None, 1])
def test_a_run_that_was_cut_off_after_its_last_step_takes_no_more(
    patience: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while its output was written, it went on from its last checkpoint by one step too many; one whose patience
    had run out, by all steps up to its next evaluation."""
    training = {"steps": 6, "evaluate_every": 1, "patience": patience} if patience else {"steps": 2}
    recipe = tiny_recipe(tmp_path / "m", training=training)
    if patience:
        monkeypatch.setattr(Scorer, "__call__", lambda *_: {"wer": 50.0})

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fuse_module, "write_run", cut)
        with pytest.raises(KeyboardInterrupt):
            fuse(recipe)
    before = load_file(tmp_path / "m.training" / "checkpoint-2" / "model.safetensors")
    record = fuse(recipe, resume=True)
    assert record["steps"] == 2
    assert record["train_loss"] == pytest.approx(
        sum(entry["loss"] for entry in record["history"] if "loss" in entry) / 2
    )
    if not patience:
        after = load_file(tmp_path / "m" / "model.safetensors")
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert not (tmp_path / "m.training").exists()


def test_a_run_that_was_cut_off_in_its_last_evaluation_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is written when scoring fails. After the last one there is no step left, but there is a score."""

    def fail(*_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "__call__", fail)
        with pytest.raises(RuntimeError):
            fuse(tiny_recipe(tmp_path / "m"))
    record = fuse(tiny_recipe(tmp_path / "m"), resume=True)
    assert (record["steps"], record["best_step"]) == (2, 2)
    assert [entry["step"] for entry in record["history"] if "eval_wer" in entry] == [2]


def test_a_run_that_was_done_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its output was in place, it could not be gone on with, and what it left beside that stayed."""
    recipe = tiny_recipe(tmp_path / "m")
    monkeypatch.setattr(record_module, "remove_folder", lambda _: None)
    record = fuse(recipe)
    assert (tmp_path / "m.training" / "checkpoint-2").is_dir()
    again = fuse(recipe, resume=True)
    assert (again["steps"], again["weights"]) == (2, record["weights"])
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with pytest.raises(ValueError, match="exists"):
        fuse(tiny_recipe(tmp_path / "m", seed=5), resume=True)
