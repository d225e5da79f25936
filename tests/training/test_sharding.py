"""Training in several processes is training in one, whether they hold whole models or shards (FSDP2)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import doc, tiny_model
from tiny_recipes import workshop
from tiny_shards import (
    MATRIX,
    SAMPLE,
    Way,
    by_trainer,
    compared,
    go_on_in_a_process,
    in_a_process,
    limits,
    spawn,
    train_in_a_process,
)
from tiny_shared import work_together
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from zipper_lm.data.collation import collate, with_every_tower
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.training.arguments import training_arguments
from zipper_lm.training.recipe import TrainingRecipe
from zipper_lm.training.sharding import frozen_modules, spread
from zipper_lm.training.trainer import ZipperTrainer


def check(differences: dict[Way, dict[str, float]], world: int) -> None:
    """Of two processes, bit for bit; of four, but for the order of sums."""
    for way, apart in differences.items():
        assert all(apart[name] <= limit for name, limit in limits(way, world).items()), (str(way), apart)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_processes_train_as_one(world: int, tmp_path: Path) -> None:
    """FSDP2 gathers a module's parameters when the module is called. Zips remembered outside a call, what was to be
    saved were shards, and where one process had no document of a modality, the others waited for it for ever."""
    spawn(in_a_process, world, str(tmp_path), str(workshop()))
    check(compared(world, tmp_path, SAMPLE), world)
    trained = [torch.load(tmp_path / f"trained-{rank}.pt") for rank in range(world)]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    expected = trained[0][str(SAMPLE[0])][0][2]
    assert all(torch.equal(again[name], tensor) for _, again, _ in found for name, tensor in expected.items())
    check_saved(tmp_path, expected, [written for written, _, _ in found])
    check_shared(world, [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)])
    if world == 2:
        check_runs(tmp_path, [runs for *_, runs in found])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_way_to_train_in_processes(world: int, tmp_path: Path) -> None:
    spawn(train_in_a_process, world, str(tmp_path), MATRIX)
    check(compared(world, tmp_path, MATRIX), world)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
def test_a_run_of_two_processes_is_gone_on_with_by_more_or_one(world: int, tmp_path: Path) -> None:
    spawn(go_on_in_a_process, 2, str(tmp_path / "run"), False)
    losses, weights = torch.load(tmp_path / "run" / "0.pt")
    spawn(go_on_in_a_process, world, str(tmp_path / "run"), True)
    for rank in range(world):
        said, ended = torch.load(tmp_path / "run" / f"{rank}.pt")
        assert said[:2] == losses[:2]
        assert said == pytest.approx(losses, rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(ended[name], weight, rtol=1e-4, atol=2e-5, msg=name)


def check_shared(world: int, found: list[Any]) -> None:
    """Evaluation by generation, judging, encoding, pseudo-labels and losses on held-out data: every process did all of
    it for itself, so that it took as long with many as with one. They take turns at pieces, which are not divided."""
    expected, alone = json.loads(json.dumps(work_together(workshop())))
    for results, _, heard in found:
        for kind, value in expected.items():
            assert results[kind] == value, kind
        assert heard[0] == "ValueError: piece 1"
    assert found[1][2][1] == "OSError: piece 1"
    assert found[0][2][1] == "RuntimeError: process 1: OSError: piece 1"
    for kind, pieces in alone.items():
        for rank, (_, done, _) in enumerate(found):
            assert done.get(kind, []) == [each for each in pieces if each[0] % world == rank], (kind, rank)


def check_runs(folder: Path, runs: list[list[tuple[list[float], dict[str, torch.Tensor]]]]) -> None:
    """By Trainer and accelerate's plugin, in one go and resumed, as in one process."""
    files = {file.name for file in (folder / "run" / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "config.json", "optimizer.bin", "scheduler.pt"} <= files
    assert not any("fsdp" in name for name in files), "the whole model was pickled beside its new weights"
    losses, weights = by_trainer(folder / "alone", 1)
    for whole, resumed in runs:
        assert resumed[0] == whole[0]
        assert all(torch.equal(resumed[1][name], tensor) for name, tensor in whole[1].items())
        assert whole[0] == pytest.approx(losses, rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(whole[1][name], weight, rtol=1e-4, atol=2e-5, msg=name)


def check_saved(folder: Path, expected: dict[str, torch.Tensor], written: list[list[list[int]]]) -> None:
    """A checkpoint of shards is like any other, and its model writes what was written in the processes."""
    for name in ("saved", "with_card"):
        model = ZipperModel.from_pretrained(folder / name).eval()
        assert all(torch.equal(parameter, expected[n]) for n, parameter in model.named_parameters())
    assert not (folder / "saved" / "README.md").exists()
    assert (folder / "with_card" / "README.md").exists()
    for rank, ids in enumerate(written):
        given = [doc(("speech", [5 + rank, 6, 7]))] * (rank + 1)
        assert [d[-1].ids for d in model.generate(given, ["text"], settings={"text": {"max_new_tokens": 5}})] == ids


def test_what_cannot_be_spread_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(train={"speech": "full"})
    args = training_arguments(TrainingRecipe(steps=1, arguments={"use_cpu": True}), tmp_path, seed=0)

    def state(**fields: Any) -> Any:
        plugin = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "ignored_modules": None} | fields
        wrapping = {"auto_wrap_policy": transformer_auto_wrap_policy, "transformer_cls_names_to_wrap": None}
        return SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin | wrapping))

    assert not spread(model, args, SimpleNamespace())
    told = state()
    assert spread(model, args, told)
    names = told.fsdp_plugin.transformer_cls_names_to_wrap
    assert names == ["GPT2Block", "InputProjection", "ZipLayer"]
    assert told.fsdp_plugin.ignored_modules == [model.tower("text")]
    assert list(frozen_modules(model)) == [model.tower("text")]
    assert set(names) < set(model._no_split_modules)
    for fields, message in (
        ({"fsdp_version": 1}, "version 1"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "FULL_STATE_DICT"),
        ({"cpu_offload": CPUOffloadPolicy()}, "cpu_offload"),
        ({"activation_checkpointing": True}, "gradient_checkpointing"),
    ):
        with pytest.raises(ValueError, match=message):
            spread(model, args, state(**fields))
    with pytest.raises(ValueError, match="torch_compile together with it"):
        spread(model, args, state(), compiled=True)
    with pytest.raises(ValueError, match="only a fused model"):
        spread(torch.nn.Linear(2, 2), args, state())
    with pytest.raises(ValueError, match="a tower alone is whole"):
        training_arguments(TrainingRecipe(arguments={"fsdp": True}), tmp_path, seed=0, alone=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="would hold whole models here"):
        spread(model, args, SimpleNamespace())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed cannot train a fused model"):
        ZipperTrainer(model, args, [])  # type: ignore[arg-type]


def test_a_tower_that_was_thawed_by_hand_is_not_lost(tmp_path: Path) -> None:
    """Its config said that it was frozen, so no checkpoint had what it learned, and nothing said so."""
    model = tiny_model()
    model.tower("text").backbone.requires_grad_(True)
    with pytest.raises(ValueError, match=r"tower 'text' is 'frozen' by its config.*would not be saved"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_weights_of_another_freeze_state_are_refused(tmp_path: Path) -> None:
    tiny_model(train={"speech": "full"}).save_pretrained(tmp_path / "m", card=False)
    other = tiny_model(train={"text": "full", "speech": "full"})
    with pytest.raises(ValueError, match=r"config.json was changed since these weights were saved"):
        other.load_own(tmp_path / "m" / "model.safetensors")


def test_a_batch_is_completed_with_padding() -> None:
    model = tiny_model(3, gate=0.5).eval()
    batch = collate([doc(("speech", [5, 6, 7]), ("image", [4]), target=True)], model.specials)
    complete = with_every_tower(batch, model.specials)
    assert list(complete) == model.names
    assert (complete["text"]["segments"] == -1).all()
    assert torch.equal(model(complete).loss, model(batch).loss)
