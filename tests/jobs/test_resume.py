"""Which checkpoint an interrupted run goes on from, and what may have changed since."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_recipes import tiny_recipe, workshop
from transformers import TrainingArguments

from zipper_lm.jobs import fuse as fuse_module
from zipper_lm.jobs import resume as module
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.reader import build, to_mapping
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.jobs.resume import begin, check_working, forget_scores, latest_checkpoint, scored_otherwise
from zipper_lm.training.base import check_step_size, step_size


def recipe(**changes: Any) -> FuseRecipe:
    fields = {"towers": {"text": "t", "speech": "s"}, "data": "here", "tasks": {"speech->text": 1}, "output": "m"}
    return build(FuseRecipe, fields | changes)


def test_a_checkpoint_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step, whole in ((5, True), (20, True), (100, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-20"


def test_a_working_folder_knows_its_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "m.training"
    begin(folder, to_mapping(recipe(seed=1)))
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "trainer_state.json").write_text("{}")
    same = recipe(seed=1, overwrite=True)
    assert check_working(folder, same, resume=True, overwrite=False) == folder / "checkpoint-5"
    with pytest.raises(ValueError, match="'seed'"):
        check_working(folder, recipe(seed=2), resume=True, overwrite=False)
    with pytest.raises(ValueError, match="checkpoint-5"):
        check_working(folder, same, resume=False, overwrite=False)
    assert check_working(folder, same, resume=False, overwrite=True) is None
    begin(folder, to_mapping(same))
    assert latest_checkpoint(folder) is None


def checkpoint(folder: Path, step: int) -> Path:
    """As Trainer writes it, but for what is in the files."""
    here = folder / f"checkpoint-{step}"
    here.mkdir(parents=True)
    save_file({"weight": torch.zeros(100)}, here / "model.safetensors")
    (here / "config.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(100)}, here / name)
    (here / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return here


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "model.safetensors", "config.json", "optimizer.pt", "rng_state.pth"]
)
@pytest.mark.parametrize("left", [0.0, 0.5])
def test_a_checkpoint_that_is_not_whole_is_skipped_and_named(
    name: str, left: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A trainer_state.json that was cut off in the middle, by a kill or a power cut, ended --resume in a traceback,
    though there was a whole checkpoint before it."""
    folder = tmp_path / "m.training"
    begin(folder, to_mapping(recipe()))
    older, newer = checkpoint(folder, 2), checkpoint(folder, 10)
    assert latest_checkpoint(folder) == newer
    content = (newer / name).read_bytes()
    (newer / name).write_bytes(content[: int(left * len(content))])
    assert latest_checkpoint(folder) == older
    with caplog.at_level(logging.WARNING):
        assert check_working(folder, recipe(), resume=True, overwrite=False) == older
    assert f"going on from checkpoint-2: {newer / name} is not whole" in caplog.text
    (older / "trainer_state.json").unlink()
    with pytest.raises(
        ValueError, match=rf"no checkpoint in .* that is whole: .*10/{name} is not whole; .*-2 has no tr"
    ):
        check_working(folder, recipe(), resume=True, overwrite=False)


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"generation": {"text": {"max_new_tokens": 8}}}, True),
        ({"scored": ["speech->text"]}, True),
        ({"judge": "elsewhere"}, True),
        ({"training": {"steps": 9, "save_every": 1}}, True),
        ({"training": {"steps": 10, "save_every": 500}}, False),
        ({"data": "other"}, False),
    ],
)
def test_how_a_run_is_scored_may_change_before_it_goes_on(change: dict[str, Any], free: bool, tmp_path: Path) -> None:
    """A generation setting that failed in the first evaluation, after hours, could not be mended: another recipe."""
    begun = {"generation": {"text": {"stop_strings": "."}}, "training": {"steps": 9, "save_every": 500}}
    begin(tmp_path / "t", to_mapping(recipe(**begun)))
    newest = checkpoint(tmp_path / "t", 5)
    now = recipe(**begun | change)
    if free:
        assert check_working(tmp_path / "t", now, resume=True, overwrite=False) == newest
        return
    with pytest.raises(ValueError, match="cannot resume"):
        check_working(tmp_path / "t", now, resume=True, overwrite=False)


def without(value: Any, keys: set[str]) -> Any:
    """Plain values without some keys, at any depth."""
    if isinstance(value, list):
        return [without(each, keys) for each in value]
    return {k: without(v, keys) for k, v in value.items() if k not in keys} if isinstance(value, dict) else value


MADE_HERE = {"towers": {"text": {"source": "t", "pretrain": {"training": {"steps": 9}}}, "speech": "s"}}


def test_a_run_that_an_older_version_began_goes_on(tmp_path: Path) -> None:
    """A key that a recipe has got since then, with its default, counted as a change where it was not free by name:
    `save_every` of a tower that is made on the way was not."""
    now = recipe(**MADE_HERE)
    newest = checkpoint(tmp_path / "t", 5)
    for older in (without(to_mapping(now), {"save_every", "best_of", "best_by"}), to_mapping(now, defaults=False)):
        (tmp_path / "t" / "recipe.json").write_text(json.dumps(older))
        assert check_working(tmp_path / "t", now, resume=True, overwrite=False) == newest
        assert not scored_otherwise(tmp_path / "t", now)
        other = recipe(**MADE_HERE, training={"weight_decay": 0.5})  # not its default
        with pytest.raises(ValueError, match=r"\['training'\] changed"):
            check_working(tmp_path / "t", other, resume=True, overwrite=False)
    (tmp_path / "t" / "recipe.json").write_text(json.dumps(to_mapping(now) | {"bygone": 1}))
    with pytest.raises(ValueError, match=r"cannot resume: .*recipe\.json: unknown key 'bygone'"):
        check_working(tmp_path / "t", now, resume=True, overwrite=False)


def test_how_often_a_tower_made_on_the_way_is_saved_may_change(tmp_path: Path) -> None:
    """It could be for the fusion, and not for its towers."""
    begin(tmp_path / "t", to_mapping(recipe(**MADE_HERE)))
    newest = checkpoint(tmp_path / "t", 5)
    for training, free in (({"steps": 9, "save_every": 1}, True), ({"steps": 8}, False)):
        towers = {"text": {"source": "t", "pretrain": {"training": training}}, "speech": "s"}
        if free:
            assert check_working(tmp_path / "t", recipe(towers=towers), resume=True, overwrite=False) == newest
        else:
            with pytest.raises(ValueError, match=r"\['towers'\] changed"):
                check_working(tmp_path / "t", recipe(towers=towers), resume=True, overwrite=False)


def test_all_checkpoints_forget_their_scores_and_nothing_else(tmp_path: Path) -> None:
    begin(tmp_path, to_mapping(recipe()))
    patience = {"args": {"early_stopping_patience": 3}, "attributes": {"early_stopping_patience_counter": 2}}
    sums = {"args": {}, "attributes": {"total": 1.5}}
    for step in (5, 10):
        state = {"global_step": step, "best_metric": 2.5, "best_global_step": 5, "best_model_checkpoint": "there"}
        state |= {"stateful_callbacks": {"EarlyStoppingCallback": patience, "LossesSoFar": sums}}
        (checkpoint(tmp_path, step) / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint(tmp_path, 20) / "trainer_state.json").write_text("{")
    forget_scores(tmp_path)
    for step in (5, 10):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        callbacks = state.pop("stateful_callbacks")
        assert state == {"global_step": step, **dict.fromkeys(state.keys() - {"global_step"})}
        counted = {"args": patience["args"], "attributes": {"early_stopping_patience_counter": 0}}
        assert callbacks == {"EarlyStoppingCallback": counted, "LossesSoFar": sums}


def test_a_step_may_be_cut_otherwise_if_its_documents_are_counted(tmp_path: Path) -> None:
    """Twice the processes with half the batch each are the same run, which the recipe's keys alone forbade; a
    checkpoint that does not say how many documents its steps have is held to the keys."""
    begin(tmp_path / "t", to_mapping(recipe(training={"batch_size": 8})))
    newest = checkpoint(tmp_path / "t", 5)
    now = recipe(training={"batch_size": 2, "arguments": {"gradient_accumulation_steps": 2}})
    with pytest.raises(ValueError, match=r"\['training'\] changed"):
        check_working(tmp_path / "t", now, resume=True, overwrite=False)
    kept = {"LossesSoFar": {"args": {}, "attributes": {"documents": 8}}}
    (newest / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": kept}))
    assert check_working(tmp_path / "t", now, resume=True, overwrite=False) == newest
    arguments = TrainingArguments(str(tmp_path / "a"), per_device_train_batch_size=4, use_cpu=True)
    with pytest.raises(ValueError, match=r"a step had 8 documents, now it has 4 \(training.batch_size 4 x"):
        check_step_size(step_size(newest), arguments)


def test_a_working_folder_is_not_there_before_it_knows_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed in between could not be begun again: its folder was taken for somebody else's."""

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "m.training", {})
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_gone_on_with_on_other_data(tmp_path: Path) -> None:
    """Rows that changed between an interruption and its resumption went unnoticed: half of what was learned was of the
    old ones, and the record told of the new."""
    home = tmp_path / "data"
    shutil.copytree(workshop() / "data", home)
    recipe = tiny_recipe(tmp_path / "m", data=str(home), training={"steps": 2, "save_every": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse_module, "write_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fuse(recipe)
    table = home / "train" / "metadata.csv"
    before = table.read_text()
    table.write_text(before.replace("six", "two"))
    with pytest.raises(ValueError, match=r"cannot resume: the rows of \['train'\] changed since"):
        fuse(recipe, resume=True)
    table.write_text(before)
    assert fuse(recipe, resume=True)["steps"] == 2
