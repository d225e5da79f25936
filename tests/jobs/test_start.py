"""Recipes that go on with a model that was fused before."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipes import plain_recipe, tiny_recipe, workshop
from transformers import LlamaForCausalLM

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
from zipper_lm.models.sharing import staged
from zipper_lm.utils.interruption import Interrupted
from zipper_lm.utils.places import working_folder


def further(start: Path | str, output: Path, **changes: Any) -> FuseRecipe:
    """A recipe that goes on with a model."""
    plain = {k: v for k, v in plain_recipe(output, **changes).items() if k in changes or k not in ("towers", "zips")}
    return build(FuseRecipe, plain | {"start": str(start)})


def first_recipe(folder: Path, train: str = "full", **changes: Any) -> dict[str, Any]:
    towers = {"text": str(workshop() / "text"), "speech": {"source": str(folder / "speech"), "train": train}}
    return plain_recipe(folder / "first", **{"towers": towers, **changes})


def first(folder: Path, train: str = "full", **changes: Any) -> Path:
    """A model of two steps, whose speech tower is nowhere else then."""
    shutil.copytree(workshop() / "speech", folder / "speech")
    fuse(build(FuseRecipe, first_recipe(folder, train, **changes)))
    if train == "full":
        shutil.rmtree(folder / "speech")
    return folder / "first"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(ZipperModel.from_pretrained(folder).state_dict())


def interrupt(recipe: FuseRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose last step is done, and nothing of what follows."""

    def stop(*_: Any) -> None:
        raise Interrupted("here")

    with monkeypatch.context() as patched:
        patched.setattr("zipper_lm.jobs.fuse.run_record", stop)
        with pytest.raises(Interrupted):
            fuse(recipe)


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
    """The checkpoint has all that was taken from `start`. It was asked for again, even of a run that was done: one that
    had been moved, or a new commit on the Hub, stood in the way."""
    start = first(tmp_path, loss_weights={"text": 2.0})
    long = {"steps": 4, "save_every": 1}
    whole = fuse(further(start, tmp_path / "whole", training=long))
    recipe = further(start, tmp_path / "parts", training=long)
    interrupt(recipe, monkeypatch)
    shutil.rmtree(start)
    parts = fuse(recipe, resume=True)
    assert parts["steps"] == whole["steps"] == 4
    assert parts["started_from"] == whole["started_from"]
    found, wanted = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert ZipperModel.from_pretrained(tmp_path / "parts").config.loss_weights == {"text": 2.0}
    assert fuse(recipe, resume=True) == parts, "it was done"


def test_of_the_run_itself_nothing_is_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run empties its working folder when it begins: a checkpoint there that it was to start from, the natural choice
    of somebody who had halted a training, was gone with all others."""
    shutil.copytree(workshop() / "speech", tmp_path / "speech")
    recipe = first_recipe(tmp_path, training={"save_every": 1})
    interrupt(build(FuseRecipe, recipe), monkeypatch)
    checkpoint = working_folder(tmp_path / "first") / "checkpoint-2"
    inside = further(checkpoint, tmp_path / "first", overwrite=True)
    with pytest.raises(ValueError, match="would replace start"):
        fuse(inside)
    judged = recipe | {"judge": str(checkpoint), "overwrite": True}
    with pytest.raises(ValueError, match="would replace judge"):
        fuse(build(FuseRecipe, judged))
    assert checkpoint.is_dir()
    with pytest.raises(ValueError, match="lies in start"):
        fuse(further(checkpoint, checkpoint / "second"))
    assert fuse(further(checkpoint, tmp_path / "second"))["steps"] == 2


def test_its_recipe_is_whole(tmp_path: Path) -> None:
    """What `with_towers` gives is a recipe again. Data are prepared, and a run planned, by it."""
    start = first(tmp_path)
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


def test_settings_are_by_modality(tmp_path: Path) -> None:
    """Settings for one modality dropped the model's for all others, weights of losses likewise."""
    start = first(tmp_path, loss_weights={"text": 2.0})
    recipe = with_towers(further(start, tmp_path / "second", generation={}))
    assert recipe.generation == {"text": {"max_new_tokens": 4}, "speech": {"max_new_tokens": 8}}
    assert recipe.loss_weights == build_model(recipe).config.loss_weights == {"text": 2.0}  # type: ignore[attr-defined]
    changes: dict[str, Any] = {"generation": {"text": {"do_sample": False}}, "loss_weights": {"speech": 0.5}}
    recipe = with_towers(further(start, tmp_path / "second", **changes))
    assert recipe.generation == {"text": {"do_sample": False}, "speech": {"max_new_tokens": 8}}
    assert recipe.loss_weights == {"text": 2.0, "speech": 0.5}


def test_a_weight_is_looked_at_before_training(tmp_path: Path) -> None:
    """A weight of -1 was found when the first checkpoint could not be written."""
    start = first(tmp_path)
    for weight in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"loss_weights\['text'\]=.*>= 0"):
            fuse(further(start, tmp_path / "second", loss_weights={"text": weight}))
    assert not working_folder(tmp_path / "second").exists()


def test_one_file_does_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`zipper fuse RECIPE.yaml start=MODEL output=ANOTHER`: the towers and zips that made it need not be taken out.
    They were held against the recipe in the model's record, and refused where that had others: of a model that was
    trained further, a training checkpoint, or one whose paths or keys were of elsewhere."""
    start = first(tmp_path)
    (tmp_path / "speech").mkdir()  # which lies with the model, and is not read there

    def again(start: Path, output: str, **changes: Any) -> FuseRecipe:
        plain = first_recipe(tmp_path, **changes) | {"start": str(start), "output": str(tmp_path / output)}
        return build(FuseRecipe, plain)

    assert with_towers(again(start, "second")).towers == with_towers(further(start, tmp_path / "second")).towers
    fuse(further(start, tmp_path / "second"))
    with staged(ZipperModel.from_pretrained(tmp_path / "second"), "me/second", kept=tmp_path / "second") as folder:
        shutil.copytree(folder, tmp_path / "copy")
    build_model(with_towers(again(tmp_path / "copy", "third")))
    (tmp_path / "second" / "run.json").write_text("{")
    interrupt(again(tmp_path / "second", "third", training={"save_every": 1}), monkeypatch)
    checkpoint = working_folder(tmp_path / "third") / "checkpoint-2"
    record = fuse(again(checkpoint, "fourth"))
    assert record["frozen_unchanged"] == {"text": True}
    assert record["recipe"]["towers"] == to_mapping(again(checkpoint, "fourth"))["towers"]


@pytest.mark.parametrize("measured", [True, False])
def test_words_for_what_was_measured(measured: bool, tmp_path: Path) -> None:
    """A recipe says ``stream`` and ``first_zip`` where the model has numbers."""
    word = {"input_projection_layer": "first_zip", "input_projection_scale": "stream" if measured else 1.0}
    towers = {"text": {"source": str(workshop() / "text"), **word}, "speech": {"source": str(workshop() / "speech")}}
    zips = [{"layers": 1, "scale": "stream" if measured else 1.0}]
    recipe = plain_recipe(tmp_path / "first", towers=towers, zips=zips)
    fuse(build(FuseRecipe, recipe))
    recipe |= {"start": str(tmp_path / "first"), "output": str(tmp_path / "second")}
    build_model(with_towers(build(FuseRecipe, recipe)))
    other = "stream" if not measured else 0.5
    with pytest.raises(ValueError, match=r"towers\.text: start .* input_projection_scale is "):
        with_towers(
            build(FuseRecipe, recipe | {"towers": towers | {"text": {**word, "input_projection_scale": other}}})
        )
    with pytest.raises(ValueError, match=r"zips: .*: scale is .*; leave zips out"):
        build_model(with_towers(build(FuseRecipe, recipe | {"zips": [{"layers": 1, "scale": other}]})))


def test_where_a_tower_is_may_be_said(tmp_path: Path) -> None:
    """A frozen tower whose folder had been moved could not be had: `towers` beside `start` had to name the old one.
    `device` was dropped without a word."""
    shutil.copytree(workshop() / "text", tmp_path / "towers" / "text")  # as a model has those that it stores along
    towers = {
        "text": str(tmp_path / "towers" / "text"),
        "speech": {"source": str(workshop() / "speech"), "train": "full"},
    }
    start = first(tmp_path, towers=towers)
    (tmp_path / "towers" / "text").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"towers\.text\.source=PATH"):
        fuse(further(start, tmp_path / "second"))
    with pytest.raises(ValueError, match="other weights"):
        fuse(further(start, tmp_path / "second", towers={"text": str(_other(tmp_path / "other"))}))
    fuse(further(start, tmp_path / "second", towers={"text": {"source": str(tmp_path / "moved"), "device": "cpu"}}))
    assert ZipperModel.from_pretrained(tmp_path / "second").config.tower_specs["text"].source == str(tmp_path / "moved")
    with pytest.raises(ValueError, match="cuda:99"):
        fuse(further(tmp_path / "second", tmp_path / "third", towers={"text": {"device": "cuda:99"}}))


def _other(folder: Path) -> Path:
    """A text tower with other weights."""
    shutil.copytree(workshop() / "text", folder)
    tower = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        tower.lm_head.weight.add_(1.0)
    tower.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("text", "bfloat16", "float32"), ("text", "float32", "bfloat16"), ("speech", "bfloat16", "float32")],
)
def test_in_what_a_tower_is_may_be_said(name: str, before: str, after: str, tmp_path: Path) -> None:
    """Training a model whose towers are bfloat16 tells to load them as float32, ``towers.NAME.config``, which could not
    be said beside `start`."""
    towers = first_recipe(tmp_path)["towers"] | {"text": {"source": str(workshop() / "text")}}
    towers[name] = {**towers[name], "config": {"dtype": before}}
    start = first(tmp_path, towers=towers)
    train = "full" if name == "speech" else "frozen"
    wanted = {name: {"train": train, "config": {"dtype": after}}}
    told = plan(
        further(start, tmp_path / "second", towers=wanted),
        lambda dtypes: DEVICES["a100"],
        lengths={"text": 8, "speech": 16},
    )
    assert told["flops"]["by_dtype"].get("bfloat16", 0) > 0 or after == "float32"
    record = fuse(further(start, tmp_path / "second", towers=wanted))
    assert record["frozen_unchanged"] == {"text": True}
    again = ZipperModel.from_pretrained(tmp_path / "second")
    assert again.tower(name).backbone.dtype == getattr(torch, after)
    assert with_towers(further(tmp_path / "second", tmp_path / "third", towers=wanted)).towers[name].config is not None


def test_a_tower_that_is_stored_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each checkpoint of the training held the whole tower anew, and hashed it."""
    towers = {"text": LlamaForCausalLM.from_pretrained(workshop() / "text"), "speech": workshop() / "speech"}
    with torch.no_grad():
        towers["text"].lm_head.weight.add_(1.0)  # type: ignore[union-attr]
    codecs = {"text": str(workshop() / "text")}
    ZipperModel.fuse(towers, codecs=codecs, zips=ZipSpec(layers=2)).save_pretrained(tmp_path / "first", card=False)
    assert (tmp_path / "first" / "towers" / "text").is_dir()
    recipe = further(tmp_path / "first", tmp_path / "second", training={"save_every": 1})
    interrupt(recipe, monkeypatch)
    assert not list(working_folder(tmp_path / "second").rglob("towers"))
    record = fuse(recipe, resume=True)
    assert record["frozen_unchanged"] == {"text": True, "speech": True}
    shutil.rmtree(tmp_path / "first")
    found = ZipperModel.from_pretrained(tmp_path / "second")
    assert found.config.tower_specs["text"].source == "towers/text"
    assert torch.equal(found.tower("text").backbone.lm_head.weight, towers["text"].lm_head.weight)  # type: ignore


def test_what_has_moved_may_be_said_on_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen tower that is stored with `start` is in no checkpoint. Where it had been moved the error named
    ``towers.text.source``, which was then refused as another recipe."""
    towers = {"text": LlamaForCausalLM.from_pretrained(workshop() / "text"), "speech": workshop() / "speech"}
    with torch.no_grad():
        towers["text"].lm_head.weight.add_(1.0)  # type: ignore[union-attr]
    codecs = {"text": str(workshop() / "text")}
    ZipperModel.fuse(towers, codecs=codecs, zips=ZipSpec(layers=2)).save_pretrained(tmp_path / "first", card=False)
    recipe = further(tmp_path / "first", tmp_path / "second", training={"save_every": 1})
    interrupt(recipe, monkeypatch)
    (tmp_path / "first").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"towers\.text\.source=PATH"):
        fuse(recipe, resume=True)
    there = {"text": {"source": str(tmp_path / "moved" / "towers" / "text")}}
    other = {"text": {**there["text"], "layers": "model.layers"}}
    wrong = further(tmp_path / "first", tmp_path / "second", training={"save_every": 1}, towers=other)
    with pytest.raises(ValueError, match="towers"):
        fuse(wrong, resume=True)
    found = further(tmp_path / "first", tmp_path / "second", training={"save_every": 1}, towers=there)
    assert fuse(found, resume=True)["frozen_unchanged"] == {"text": True, "speech": True}


def test_a_field_at_its_default_counts_as_left_out(tmp_path: Path) -> None:
    """To say in which dtype a tower is, all that is not default of it had to be said again, though warnings advise the
    dtype alone."""
    towers = first_recipe(tmp_path)["towers"]
    towers["text"] = {"source": str(workshop() / "text"), "input_projection_layer": "first_zip"}
    towers["text"] |= {"input_projection_scale": "stream", "config": {"rms_norm_eps": 1e-5}}
    start = first(tmp_path, towers=towers)
    wanted = {"text": {"config": {"dtype": "bfloat16"}}}
    model = build_model(with_towers(further(start, tmp_path / "second", towers=wanted)))
    assert isinstance(model, ZipperModel)
    assert model.tower("text").backbone.dtype == torch.bfloat16
    assert model.tower("text").backbone.config.rms_norm_eps == 1e-5


def test_of_a_model_on_the_hub_no_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning and preparing fetched all of it."""
    start, fetched = first(tmp_path), []

    def download(source: str, allow_patterns: Any = None, **_: Any) -> str:
        assert source == "owner/model"
        for file in (p for p in start.rglob("*") if p.is_file()):
            name = str(file.relative_to(start))
            if allow_patterns is None or any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                fetched.append(name)
                (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, tmp_path / "snapshot" / name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("zipper_lm.utils.hub.snapshot_download", download)
    recipe = further("owner/model", tmp_path / "second")
    prepare(recipe, tmp_path / "prepared")
    plan(recipe, lambda dtypes: DEVICES["a100"])
    assert {"config.json", "generation.json", "codecs/speech/codec.json"} <= set(fetched)
    assert "model.safetensors" not in fetched
    record = fuse(recipe)
    assert "snapshot" not in json.dumps(record["recipe"]), "another commit would lie elsewhere"


def test_the_record_says_what_it_began_with(tmp_path: Path) -> None:
    """The card of a model that was trained further told of its last steps alone."""
    start = first(tmp_path)
    fuse(further(start, tmp_path / "second"))
    record = fuse(further(tmp_path / "second", tmp_path / "third", training={"steps": 1}))
    data = str(workshop() / "data")
    assert record["started_from"] == {
        "source": str(tmp_path / "second"),
        "steps": 2,
        "data": data,
        "started_from": {"source": str(start), "steps": 2, "data": data},
    }
    card = (tmp_path / "third" / "README.md").read_text()
    assert "| Started from | `second`, of 2 steps on `data`; that from `first`, of 2 steps on `data` |" in card


def test_what_is_refused(tmp_path: Path) -> None:
    start = first(tmp_path)
    single = tmp_path / "single"
    fuse(
        tiny_recipe(single, architecture="single-decoder", towers={n: str(workshop() / n) for n in ("text", "speech")})
    )
    other = {"source": str(tmp_path / "elsewhere"), "train": "full"}
    for wrong, message in (
        ({"start": str(tmp_path / "none")}, "start: .*none': no such folder"),
        ({"start": str(single)}, "start: .*single is a single decoder"),
        ({"start": str(workshop() / "text")}, "holds no zipped model"),
        ({"towers": {"image": {}}}, r"towers names \['image'\], but start .* has \['speech', 'text'\]"),
        ({"towers": {"speech": {}}}, r"towers.speech: start .*: train is 'frozen', there 'full'"),
        ({"towers": {"speech": other}}, "source is .*elsewhere', there 'speech'"),
        ({"towers": {"text": {"layers": "model.layers"}}}, "layers is 'model.layers', there None"),
        ({"towers": {"text": {"config": {"rms_norm_eps": 0.5}}}}, "config is .*rms_norm_eps"),
        ({"towers": {"text": {"config": {"dtype": "int8"}}}}, "towers.text.config: dtype='int8'"),
        ({"towers": {"text": {"codec": str(workshop() / "speech")}}}, "towers.text.codec: start .* has another one"),
        ({"zips": [{"layers": 1}]}, "zips: .*layers is .*; leave zips out"),
        ({"zips": [{"reader": "text", "layers": 2, "gate_start": 0.1}]}, "zips: text<-speech, but start has"),
        ({"zips": [{"reader": "image"}]}, "zips: zip.reader names tower 'image'.*; leave zips out"),
        ({"output": str(start), "overwrite": True}, "start"),
        ({"start": None}, "missing towers"),
        ({"start": None, "towers": {"text": {}}}, "missing towers.text.source"),
        ({"architecture": "single-decoder"}, "start=.* is for towers"),
    ):
        plain = to_mapping(further(start, tmp_path / "second")) | wrong
        with pytest.raises(ValueError, match=message):
            fuse(build(FuseRecipe, plain))
    assert not (tmp_path / "second.training").exists()


def test_code_of_its_own_runs_when_the_recipe_says_so(tmp_path: Path) -> None:
    """A model's own word for code that may run does not count; the user's could not be given."""
    start = first(tmp_path)
    config = json.loads((start / "config.json").read_text())
    config["towers"]["text"]["trust_remote_code"] = True
    (start / "config.json").write_text(json.dumps(config))
    for towers in ({}, {"speech": {"train": "full", "trust_remote_code": True}}):
        with pytest.raises(ValueError, match=r"'text' .*in a recipe with start, set towers\.text\.trust"):
            build_model(with_towers(further(start, tmp_path / "second", towers=towers)))
    build_model(with_towers(further(start, tmp_path / "second", towers={"text": {"trust_remote_code": True}})))


def test_an_experiment_does_not_take_it(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"start: somewhere\ndata: {workshop() / 'data'}\ntasks: {{speech->text: 1}}\noutput: x\n")
    experiment = Experiment(question="?", recipe=str(file), arms={"a": Arm()})
    run = Run(arm="a", point="", trial="", seed=1, reported=True, changes=())
    with pytest.raises(ValueError, match="start='somewhere' is not followed in experiments"):
        recipe_of(experiment, run, "")
