"""Recipes that go on with a model that was fused before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipes import plain_recipe, tiny_recipe, workshop

from zipper_lm import ZipperModel, ZipSpec
from zipper_lm.experiments.plan import Arm, Experiment, Run, recipe_of
from zipper_lm.jobs.cost.devices import DEVICES
from zipper_lm.jobs.cost.plan import plan
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.prepare import prepare
from zipper_lm.jobs.recipes.reader import build, to_mapping
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.jobs.start import with_towers
from zipper_lm.jobs.towers import build_model
from zipper_lm.utils.interruption import Interrupted


def further(start: Path | str, output: Path, **changes: Any) -> FuseRecipe:
    """A recipe that goes on with a model."""
    plain = plain_recipe(output, **changes)
    return build(FuseRecipe, {k: v for k, v in plain.items() if k not in ("towers", "zips")} | {"start": str(start)})


def first_recipe(folder: Path, train: str = "full", **changes: Any) -> dict[str, Any]:
    towers = {"text": str(workshop() / "text"), "speech": {"source": str(folder / "speech"), "train": train}}
    return plain_recipe(folder / "first", towers=towers, **changes)


def first(folder: Path, train: str = "full", **changes: Any) -> Path:
    """A model of two steps, whose speech tower is nowhere else then."""
    shutil.copytree(workshop() / "speech", folder / "speech")
    fuse(build(FuseRecipe, first_recipe(folder, train, **changes)))
    if train == "full":
        shutil.rmtree(folder / "speech")
    return folder / "first"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(ZipperModel.from_pretrained(folder).state_dict())


@pytest.mark.parametrize("train", ["full", "lora"])
def test_training_goes_on_where_it_ended(train: str, tmp_path: Path) -> None:
    """A fused model could be trained further in Python alone: a recipe always began with zips that add nothing, though
    somebody who has a model and more pairs, or more time, wants that first."""
    start = first(tmp_path, train)
    before, files = weights(start), {p: p.read_bytes() for p in start.rglob("*") if p.is_file()}
    begun = build_model(with_towers(further(start, tmp_path / "second"))).state_dict()
    assert all(torch.equal(tensor, begun[name]) for name, tensor in before.items())
    record = fuse(further(start, tmp_path / "second", tasks={"speech->text": 1.0}, training={"learning_rate": 1e-3}))
    assert record["frozen_unchanged"] == {"text": True}
    assert record["recipe"]["start"] == str(start)
    after = weights(tmp_path / "second")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name.split(".")[0] for name in changed} >= {"zips", "towers"}
    assert not any(name.startswith("towers.text.") for name in changed)
    assert max(float((after[name] - before[name]).abs().max()) for name in changed) < 0.01  # two small steps
    assert {p: p.read_bytes() for p in start.rglob("*") if p.is_file()} == files


def test_measures_are_those_of_the_first_training(tmp_path: Path) -> None:
    """How large a stream is, and how long texts are beside sounds, is measured once: other numbers would change what
    the weights mean."""
    start = first(tmp_path, zips=[{"layers": 2, "gate_start": 0.1, "scale": "stream", "positions": "sinusoid"}])
    old = ZipperModel.from_pretrained(start).config
    assert old.zip_specs[0].stretch is not None
    fuse(further(start, tmp_path / "second", data={"source": str(workshop() / "data"), "limit": 2}))
    new = ZipperModel.from_pretrained(tmp_path / "second").config
    assert new.zips == old.zips
    assert new.fingerprint == old.fingerprint


def test_what_was_not_measured_is_not(tmp_path: Path) -> None:
    """A model that was fused and trained in Python has zips without a stretch, which is 1. It was measured on the new
    data when such a model was trained further, so that all places changed under weights that were trained."""
    model = ZipperModel.fuse({name: workshop() / name for name in ("text", "speech")}, zips=ZipSpec(layers=2))
    model.save_pretrained(tmp_path / "first", card=False)
    fuse(further(tmp_path / "first", tmp_path / "second"))
    assert [z.stretch for z in ZipperModel.from_pretrained(tmp_path / "second").config.zip_specs] == [None, None]


def test_it_is_gone_on_with_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = first(tmp_path)
    long = {"steps": 4, "save_every": 1}
    whole = fuse(further(start, tmp_path / "whole", training=long))

    def stop(*_: Any) -> None:
        raise Interrupted("here")

    monkeypatch.setattr("zipper_lm.jobs.fuse.run_record", stop)
    with pytest.raises(Interrupted):
        fuse(further(start, tmp_path / "parts", training=long))
    monkeypatch.undo()
    parts = fuse(further(start, tmp_path / "parts", training=long), resume=True)
    assert parts["steps"] == whole["steps"] == 4
    found, wanted = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert fuse(further(start, tmp_path / "parts", training=long), resume=True) == parts, "it was done"


def test_its_recipe_is_whole(tmp_path: Path) -> None:
    """What the record says, with towers and zips, is a recipe again. Data are prepared, and a run planned, by it."""
    start = first(tmp_path, loss_weights={"text": 2.0})
    recipe = with_towers(further(start, tmp_path / "second", generation={}))
    assert recipe.generation == {"text": {"max_new_tokens": 4}, "speech": {"max_new_tokens": 8}}
    assert recipe.loss_weights == build_model(recipe).config.loss_weights == {"text": 2.0}  # type: ignore[attr-defined]
    recipe = with_towers(further(start, tmp_path / "second"))
    assert with_towers(build(FuseRecipe, to_mapping(recipe))) == recipe
    assert list(recipe.towers) == ["speech", "text"]
    made = prepare(further(start, tmp_path / "second"), tmp_path / "prepared")
    assert made["splits"]["train"]["rows"] == 12
    record = fuse(further(start, tmp_path / "second", data=str(tmp_path / "prepared")))
    assert record["steps"] == 2
    told = plan(further(start, tmp_path / "third"), lambda dtypes: DEVICES["a100"], lengths={"text": 8, "speech": 16})
    trained = sum(p.numel() for p in ZipperModel.from_pretrained(start).parameters() if p.requires_grad)
    assert sum(part["trained"] for part in told["parameters"].values()) == trained
    assert not any("towers." in row["way"] for row in told["ways"])


def test_one_file_does_for_both_runs(tmp_path: Path) -> None:
    """`zipper fuse RECIPE.yaml start=MODEL output=ANOTHER`: the towers and zips that made it need not be taken out."""
    start = first(tmp_path)
    again = build(FuseRecipe, first_recipe(tmp_path) | {"start": str(start), "output": str(tmp_path / "second")})
    assert with_towers(again) == with_towers(further(start, tmp_path / "second"))


def test_what_is_refused(tmp_path: Path) -> None:
    start = first(tmp_path)
    own = {"towers": {"text": str(workshop() / "text"), "speech": str(workshop() / "speech")}}
    single = tmp_path / "single"
    fuse(tiny_recipe(single, architecture="single-decoder", towers=own["towers"]))
    for wrong, message in (
        ({"start": str(tmp_path / "none")}, "start: .*none': no such folder"),
        ({"start": str(single)}, "start: .*single is a single decoder"),
        ({"start": str(workshop() / "text")}, "holds no zipped model"),
        (own, "towers: those of start .* not others; leave towers out"),
        ({"zips": [{"layers": 1}]}, "zips: those of start .* not others; leave zips out"),
        ({"output": str(start), "overwrite": True}, "start"),
        ({"start": None}, "missing towers"),
        ({"architecture": "single-decoder"}, "start=.* is for towers"),
    ):
        plain = to_mapping(further(start, tmp_path / "second")) | wrong
        with pytest.raises(ValueError, match=message):
            fuse(build(FuseRecipe, plain))
    assert not (tmp_path / "second.training").exists()


def test_an_experiment_does_not_take_it(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"start: somewhere\ndata: {workshop() / 'data'}\ntasks: {{speech->text: 1}}\noutput: x\n")
    experiment = Experiment(question="?", recipe=str(file), arms={"a": Arm()})
    run = Run(arm="a", point="", trial="", seed=1, reported=True, changes=())
    with pytest.raises(ValueError, match="start='somewhere' is not followed in experiments"):
        recipe_of(experiment, run, "")
