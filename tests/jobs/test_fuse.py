"""A fusion from recipe to model: what it leaves, how it resumes, what it refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_recipes import tiny_recipe, workshop

from zipper_lm import Document, ZipperModel, read_recipe
from zipper_lm.data.sources.readers import read_rows
from zipper_lm.evaluation.preservation import verify
from zipper_lm.jobs import fuse as fuse_module
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.checks import check_recipe
from zipper_lm.jobs.towers import build_model
from zipper_lm.jobs.validation import Scorer
from zipper_lm.models.baseline.single_decoder import SingleDecoder
from zipper_lm.models.records import generation_settings
from zipper_lm.training.callbacks import Interrupted
from zipper_lm.training.parameters import parameter_groups
from zipper_lm.training.trainer import ZipperTrainer
from zipper_lm.utils.places import working_folder

WILD = {"steps": 5, "evaluate_every": 3, "corrupt": 0.3, "interleave": 0.4}


def losses(record: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in record["history"] if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the given step is being computed."""
    real = ZipperTrainer.training_step

    def training_step(self: ZipperTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ZipperTrainer, "training_step", training_step)


def test_what_a_run_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(stderr=True, width=200)
    record = fuse(tiny_recipe(tmp_path / "model", training={"steps": 3, "evaluate_every": 2}), console=console)
    folder = tmp_path / "model"
    assert json.loads((folder / "run.json").read_text())["recipe_hash"] == record["recipe_hash"]
    assert record["made_with"]["torch"] == torch.__version__
    assert generation_settings(folder)["text"] == {"max_new_tokens": 4}
    assert record["frozen_unchanged"] == {"text": True}
    scored = [entry for entry in record["history"] if "eval_wer" in entry]
    assert [entry["step"] for entry in scored] == [2, 3]
    assert record["best_step"] == min(scored, key=lambda e: e["eval_wer"])["step"]
    assert set(record["perplexity_after"]) == {"speech"}
    events = EventAccumulator(str(folder / "logs")).Reload()
    assert {"train/loss", "train/loss_text", "eval/wer", "train/gate/text<-speech.0"} <= set(events.Tags()["scalars"])
    assert not working_folder(folder).exists()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("parameters: ") == 1
    reports = {r.name: r for r in verify(ZipperModel.from_pretrained(folder), folder)}
    assert reports["text"].identical
    assert reports["speech"].equal < reports["speech"].tensors


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole") / "model"
    return folder, fuse(tiny_recipe(folder, training=WILD))


@pytest.mark.parametrize("step", [2, 4])  # in the first epoch (of three steps), and in the second
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    step: int, whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path / "broken", training=WILD)
    with monkeypatch.context() as patch:
        interrupt_at(step, patch)
        with pytest.raises(Interrupted, match=f"step {step}"):
            fuse(recipe)
    assert not (tmp_path / "broken").exists()
    assert (working_folder(tmp_path / "broken") / f"checkpoint-{step}").is_dir()
    with pytest.raises(ValueError, match="interrupted run"):
        fuse(recipe)
    with pytest.raises(ValueError, match="'training'"):
        fuse(tiny_recipe(tmp_path / "broken", training=WILD | {"steps": 9}), resume=True)
    resumed = fuse(recipe, resume=True)
    assert losses(resumed) == losses(whole[1])
    theirs, ours = weights(whole[0]), weights(tmp_path / "broken")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_run_on_a_stream_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a stream was encoded before training began, so that it had to end and to fit into memory. Here it is
    interrupted in the midst of a buffer, in its second epoch."""
    raw = list(read_rows(workshop() / "data"))
    stream = datasets.Dataset.from_list([{"text": r["text"], "audio": Path(r["speech"]).read_bytes()} for r in raw])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream.to_iterable_dataset(num_shards=3))
    data = {"source": "someone/data", "validation": None, "streaming": True, "buffer": 5}
    training = {"steps": 5, "batch_size": 4, "save_every": 1, "corrupt": 0.2}
    recipes = {name: tiny_recipe(tmp_path / name, data=data, training=training) for name in ("whole", "broken")}
    before = fuse(recipes["whole"])
    with monkeypatch.context() as patch:
        interrupt_at(4, patch)
        with pytest.raises(Interrupted, match="step 4"):
            fuse(recipes["broken"])
    (state,) = working_folder(tmp_path / "broken").glob("checkpoint-4/trainer_state.json")
    place = json.loads(state.read_text())["stateful_callbacks"]["LossesSoFar"]["attributes"]["place"]
    assert (place["first"], place["epoch"], place["row"]) == (12, 1, 0)
    resumed = fuse(recipes["broken"], resume=True)
    assert losses(resumed) == losses(before)
    theirs, ours = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    workers = training | {"arguments": {"dataloader_num_workers": 1}}
    with pytest.raises(ValueError, match="dataloader_num_workers=1 must be 0"):
        fuse(tiny_recipe(tmp_path / "w", data=data, training=workers))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"source": "here", "buffer": 0}}, r"data\.buffer must be at least 1"),
        ({"data": {"source": "here", "buffer": 9, "broken_limit": 1}}, r"cannot be had with data\.broken_limit"),
        ({"data": {"source": "here", "buffer": 9}, "training": {"join": 0.5}}, r"cannot be had with training\.join"),
        (
            {"data": {"source": "here", "buffer": 9}, "training": {"history_dropout": {"text": 0.1}}},
            r"cannot be had with training\.history_dropout of a frozen tower",
        ),
    ],
)
def test_what_needs_other_rows_cannot_be_had_with_a_buffer(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_recipe(Path("m"), **changes)


def test_a_run_that_dies_goes_on_from_a_checkpoint_between_evaluations(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default recipe wrote its first checkpoint after its last step, and others could not be asked for: whatever
    ended a run before, all was lost. And the best checkpoint by the scores stays the result."""
    recipe = tiny_recipe(tmp_path / "broken", training=WILD | {"save_every": 2})
    real = ZipperTrainer.training_step

    def training_step(self: ZipperTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            raise RuntimeError("died")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ZipperTrainer, "training_step", training_step)
        with pytest.raises(RuntimeError, match="died"):
            fuse(recipe)
    kept = {p.name for p in working_folder(tmp_path / "broken").glob("checkpoint-*")}
    assert kept == {"checkpoint-3", "checkpoint-4"}  # the best so far, and the newest
    resumed = fuse(recipe, resume=True)
    assert losses(resumed) == losses(whole[1])
    assert resumed["best_step"] == whole[1]["best_step"]
    theirs, ours = weights(whole[0]), weights(tmp_path / "broken")
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_scores_of_other_tasks_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which tasks are scored may change before a run goes on, but the best score of the old ones stayed the one to
    beat: the checkpoint that was kept was chosen by what the recipe no longer said, and patience counted on."""
    scores = iter([1.0, 2.0, 50.0, 40.0, 60.0, 70.0])
    scored: list[list[str]] = []

    def score(self: Scorer, model: Any) -> dict[str, float]:
        scored.append(self.tasks)
        return {"wer": next(scores)}

    monkeypatch.setattr(Scorer, "__call__", score)
    training = {"steps": 8, "evaluate_every": 1, "patience": 2}
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        with pytest.raises(Interrupted, match="step 2"):
            fuse(tiny_recipe(tmp_path / "m", training=training, scored=["speech->text"]))
    capsys.readouterr()
    changed = tiny_recipe(tmp_path / "m", training=training, scored=["text->speech"])
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(Interrupted, match="step 3"):
            fuse(changed, resume=True)
    assert "the best score so far is forgotten: scored changed since it was found" in capsys.readouterr().err
    record = fuse(changed, resume=True)  # as it was scored from then on: nothing more to forget
    assert "forgotten" not in capsys.readouterr().err
    assert scored == [["speech->text"]] * 2 + [["text->speech"]] * 4
    assert (record["best_step"], record["steps"]) == (4, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speech": {"bad_words_ids": [[10**6]]}}, r"generation\.speech: tried before training: "),
        ({"text": {"sequence_bias": [[[10**6], -1.0]]}}, r"generation\.text: tried before training: "),
        ({"speech": {"stop_strings": ["."]}}, r"generation\.speech: .*stop_strings needs a codec of text"),
    ],
)
def test_settings_that_generate_refuses_are_found_before_training(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were met in the first evaluation, by default after the last step; and the mended recipe was another one,
    with which the run could not go on."""
    monkeypatch.setattr(ZipperTrainer, "training_step", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        fuse(tiny_recipe(tmp_path / "m", generation=settings))
    assert not list(tmp_path.iterdir())


def test_who_cannot_read_its_samples_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def training_step(*_: Any, **__: Any) -> None:
        raise AssertionError("begun")

    monkeypatch.setattr(ZipperTrainer, "training_step", training_step)
    how: dict[str, Any] = {"best_of": 3, "best_by": "reading", "scored": ["speech->text"]}
    with pytest.raises(ValueError, match=r"tried before training: .* no tower reads 'text'"):
        fuse(tiny_recipe(tmp_path / "m", zips=[{"reader": "text", "source": "speech", "layers": 2}], **how))


@pytest.mark.parametrize("generation", [{"text": {"num_beams": 2}}, {"speech": {"max_new_tokens": 8}}])
def test_samples_are_tried_before_training_as_they_are_scored(
    generation: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`best_of: 3` with two beams ended the run after its last step: what was tried was the settings without the
    samples. And a modality without settings was not tried at all."""
    trained: list[int] = []
    tried: list[tuple[list[str], dict[str, Any]]] = []
    real = ZipperModel.generate

    def generate(self: ZipperModel, documents: Any, schedule: Any, **given: Any) -> Any:
        tried.append((schedule, given["settings"]))
        return real(self, documents, schedule, **given)

    def training_step(*_: Any, **__: Any) -> None:
        trained.append(1)
        raise RuntimeError("begun")

    monkeypatch.setattr(ZipperModel, "generate", generate)
    monkeypatch.setattr(ZipperTrainer, "training_step", training_step)
    beams = "text" in generation
    message = r"generation\.text with best_of=3: tried before training: .*num_beams" if beams else "begun"
    with pytest.raises(ValueError if beams else RuntimeError, match=message):
        fuse(tiny_recipe(tmp_path / "m", generation=generation, best_of=3, scored=["speech->text"]))
    assert bool(trained) != beams
    schedule, settings = tried[-1]
    assert (schedule, settings["text"]["num_return_sequences"], len(tried)) == (["text"], 3, 2)


def test_a_trial_of_the_settings_changes_nothing(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(fuse_module, "try_settings", lambda *given: tried.append(given))
    record = fuse(tiny_recipe(tmp_path / "m", training=WILD))
    assert len(tried) == 1
    assert losses(record) == losses(whole[1])
    theirs, ours = weights(whole[0]), weights(tmp_path / "m")
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_rows_are_joined_in_training_and_have_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the longest rows come together some day, perhaps after hours."""
    lengths: list[int] = []
    real = ZipperTrainer.compute_loss

    def compute_loss(self: ZipperTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.append(inputs["batch"]["text"]["input_ids"].shape[1])
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ZipperTrainer, "compute_loss", compute_loss)
    fuse(tiny_recipe(tmp_path / "plain"))
    plain, lengths = max(lengths), []
    fuse(tiny_recipe(tmp_path / "joined", training={"join": 0.99}))
    assert max(lengths) > plain
    towers = {"text": {"source": str(workshop() / "text"), "config": {"max_position_embeddings": plain + 1}}}
    towers["speech"] = {"source": str(workshop() / "speech"), "train": "full"}
    check = tiny_recipe(tmp_path / "long", training={"join": 0.5}, towers=towers)
    with pytest.raises(ValueError, match=rf"tower 'text': the longest stream .*, the backbone {plain + 1} positions"):
        fuse(check)
    fuse(tiny_recipe(tmp_path / "short", towers=towers))


def test_a_fresh_run_ignores_what_an_older_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"source": str(workshop() / "data"), "validation": None}
    with monkeypatch.context() as patch:
        interrupt_at(1, patch)
        with pytest.raises(Interrupted):
            fuse(tiny_recipe(tmp_path / "m", data=data))
    record = fuse(tiny_recipe(tmp_path / "m", data=data, overwrite=True))
    assert [e["step"] for e in record["history"] if "loss" in e] == [1, 2]


def test_evaluation_does_not_disturb_training(tmp_path: Path) -> None:
    sampled = {"text": {"max_new_tokens": 4, "do_sample": True}, "speech": {"max_new_tokens": 8, "do_sample": True}}
    training = {"steps": 5, "corrupt": 0.3}
    here = {"source": str(workshop() / "data")}
    zips = [{"layers": 2, "gate_start": 0.1, "dropout": 0.3}]  # so that training draws random numbers too
    often = fuse(tiny_recipe(tmp_path / "a", generation=sampled, zips=zips, training=training | {"evaluate_every": 1}))
    never = fuse(tiny_recipe(tmp_path / "b", zips=zips, training=training, data=here | {"validation": None}))
    assert losses(often) == losses(never)


def test_early_stopping_and_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([50.0, 10.0, 60.0, 70.0, 80.0])
    monkeypatch.setattr("zipper_lm.jobs.validation.Scorer.__call__", lambda self, model: {"wer": next(scores)})
    states = []
    real = ZipperTrainer.evaluate

    def evaluate(self: ZipperTrainer, *args: Any, **kwargs: Any) -> Any:
        states.append(self.model.zips["text"]["speech"][0].q_proj.weight.detach().clone().cpu())  # type: ignore[union-attr]
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ZipperTrainer, "evaluate", evaluate)
    record = fuse(tiny_recipe(tmp_path / "m", training={"steps": 9, "evaluate_every": 1, "patience": 2}))
    assert (record["steps"], record["best_step"]) == (4, 2)
    assert torch.equal(weights(tmp_path / "m")["zips.text.speech.0.q_proj.weight"], states[1])


def test_adapters_accumulation_and_gradient_checkpointing(tmp_path: Path) -> None:
    speech = {"source": str(workshop() / "speech"), "train": "lora", "lora": {"r": 2}}
    arguments = {"disable_tqdm": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    training = {"arguments": arguments, "batch_size": 2}
    towers = {"text": str(workshop() / "text"), "speech": speech}
    fuse(tiny_recipe(tmp_path / "m", towers=towers, training=training))
    model = ZipperModel.from_pretrained(tmp_path / "m")
    tower = model.tower("speech")
    assert {n for n, p in tower.backbone.named_parameters() if p.requires_grad} == set(tower.adapter_names)
    moved = [p for n, p in tower.backbone.named_parameters() if "lora_B" in n and p.abs().max() > 0]
    assert moved
    assert all(r.identical for r in verify(model, tmp_path / "m"))
    assert all(p.requires_grad == (n in tower.adapter_names) for n, p in tower.backbone.named_parameters())


@pytest.mark.parametrize("train", ["full", "lora"])
def test_the_baseline_goes_through_the_same_recipe(train: str, tmp_path: Path) -> None:
    here = workshop()
    towers = {"text": {"source": str(here / "text"), "train": train}, "speech": str(here / "speech")}
    record = fuse(tiny_recipe(tmp_path / "m", towers=towers, architecture="single-decoder"))
    assert record["frozen_unchanged"] == {}
    assert set(record["perplexity_after"]) == {"text", "speech"}
    assert all(record["perplexity_after"][n] != record["perplexity_before"][n] for n in ("text", "speech"))
    assert {"eval_wer/speech->text", "eval_wer/text->speech"} <= {k for e in record["history"] for k in e}
    model = SingleDecoder.from_pretrained(tmp_path / "m")
    (written,) = model.generate(
        [Document([("text", "one two")])], ["speech"], settings={"speech": {"max_new_tokens": 4}}
    )
    assert isinstance(written[1].value, np.ndarray)


def test_a_single_decoder_is_trained_on_unaligned_data_and_then_further(tmp_path: Path) -> None:
    here = workshop()
    towers = {"text": str(here / "text"), "speech": str(here / "speech")}
    alone = {"->speech": 1.0, "->text": 1.0}
    first = fuse(tiny_recipe(tmp_path / "a", towers=towers, architecture="single-decoder", tasks=alone, judge=None))
    assert any("eval_loss" in e for e in first["history"])
    towers["text"] = str(tmp_path / "a")
    training = {"learning_rate": 0.0, "tower_learning_rate": 0.0}
    second = fuse(tiny_recipe(tmp_path / "b", towers=towers, architecture="single-decoder", training=training))
    assert second["perplexity_before"] == pytest.approx(first["perplexity_after"])
    assert weights(tmp_path / "b").keys() == weights(tmp_path / "a").keys()
    assert all(torch.equal(t, weights(tmp_path / "a")[n]) for n, t in weights(tmp_path / "b").items())


def test_validation_rows_without_words_are_left_out_of_the_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of them ended a run at its first score, which by default comes after the last step: all was lost."""
    data = shutil.copytree(workshop() / "data", tmp_path / "data")
    table = data / "validation" / "metadata.csv"
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[1]["transcription"] = ""
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    console = Console(stderr=True, width=200)
    record = fuse(tiny_recipe(tmp_path / "m", data={"source": str(data)}), console=console)
    assert any("eval_wer" in entry for entry in record["history"])
    assert "1 validation rows have no words in their text" in capsys.readouterr().err


def test_scores_that_fail_do_not_take_the_steps_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer scores before it saves: an error in the first score, which by default comes after the last step, left
    neither a model nor a checkpoint to go on from."""
    with monkeypatch.context() as patch:
        patch.setattr("zipper_lm.jobs.validation.score_task", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fuse(tiny_recipe(tmp_path / "m"))
    record = fuse(tiny_recipe(tmp_path / "m"), resume=True)
    assert record["steps"] >= 2  # Trainer takes one more
    assert ZipperModel.from_pretrained(tmp_path / "m").gates() == record["gates"]


def test_a_single_decoder_trained_in_full_goes_on_under_lora(tmp_path: Path) -> None:
    """It was refused, so that the baseline under LoRA could see no unaligned data: adapters are too few for that."""
    here = workshop()
    towers: dict[str, Any] = {"text": str(here / "text"), "speech": str(here / "speech")}
    first = fuse(tiny_recipe(tmp_path / "a", towers=towers, architecture="single-decoder", judge=None))
    towers["text"] = {"source": str(tmp_path / "a"), "train": "lora", "lora": {"r": 2}}
    second = fuse(tiny_recipe(tmp_path / "b", towers=towers, architecture="single-decoder", judge=None))
    assert second["perplexity_before"] == pytest.approx(first["perplexity_after"])
    assert second["parameters"]["trained"] < first["parameters"]["trained"]
    old, new = weights(tmp_path / "a"), weights(tmp_path / "b")
    same = [
        n for n, t in old.items() if torch.equal(t, new.get(n, new.get(n.replace(".weight", ".base_layer.weight"))))
    ]
    changed = set(old) - set(same)
    assert changed
    assert all("embed" in n or "head" in n for n in changed), "the layers' own weights stay"
    assert any("lora" in n and t.any() for n, t in new.items())
    towers["text"] = {"source": str(tmp_path / "b"), "train": "full"}
    recipe = tiny_recipe(tmp_path / "c", towers=towers, architecture="single-decoder")
    with pytest.raises(ValueError, match=r"trained 'lora'; the recipe has .* and train 'full'"):
        build_model(recipe)


def test_unimodal_documents_leave_the_zips_alone(tmp_path: Path) -> None:
    """``->speech`` is replay: the trained tower goes on reading its own modality as it did before."""
    record = fuse(tiny_recipe(tmp_path / "m", tasks={"->speech": 1.0}, judge=None))
    assert record["perplexity_after"]["speech"] != record["perplexity_before"]["speech"]
    model, fresh = ZipperModel.from_pretrained(tmp_path / "m"), build_model(tiny_recipe(tmp_path / "other"))
    assert model.gates() == fresh.gates()


def test_frozen_and_lora_towers_do_not_see_the_optimizer(tmp_path: Path) -> None:
    model = build_model(tiny_recipe(tmp_path / "m"))
    groups = parameter_groups(model, tower_learning_rate=1e-4, weight_decay=0.1)
    trained = [id(p) for g in groups for p in g["params"]]
    assert len(trained) == len(set(trained))
    assert set(trained) == {id(p) for p in model.parameters() if p.requires_grad}
    assert not set(trained) & {id(p) for p in model.tower("text").parameters()}
    assert {g["weight_decay"] for g in groups if all(p.dim() < 2 for p in g["params"])} == {0.0}
    speech = {id(p) for p in model.tower("speech").parameters()}
    assert all(("lr" in g) == (id(g["params"][0]) in speech) for g in groups)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        parameter_groups(model.requires_grad_(False), tower_learning_rate=1e-4, weight_decay=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {"speech->image": 1}}, "image"),
        ({"loss_weights": {"image": 1}}, "loss_weights names .*image"),
        ({"generation": {"image": {}}}, "generation names .*image"),
        ({"generation": {"text": {"temprature": 1}}}, "generation.text: .*temprature"),
        # These were met when the first scores were generated: after the last step, and nothing had been saved.
        ({"generation": {"text": {"num_beams": 0}}}, "generation.text: .*num_beams must be at least 1, got 0"),
        (
            {"generation": {"text": {"max_new_tokens": 0}}},
            "generation.text: .*max_new_tokens. must be greater",
        ),
        ({"generation": {"text": {"max_new_tokens": "5"}}}, "generation.text: .*max_new_tokens must be a whole number"),
        (
            {"generation": {"text": {"guidance_scale": 2.0, "num_beams": 2}}},
            "generation.text: .*guidance_scale",
        ),
        ({"training": {"corrupt": {"image": 0.1}}}, "training.corrupt names .*image"),
        ({"training": {"corrupt": {"text": 1.5}}}, "training.corrupt must be in"),
        ({"training": {"join": {"text->text": 0.1}}}, "training.join names .*text->text"),
        ({"scored": ["text->text"]}, r"scored names \['text->text'\], but the tasks with a weight above 0 are"),
        ({"scored": []}, "scored: name at least one task"),
        (
            {"training": {"join": {"speech->text->speech": 0.1}}, "tasks": {"speech->text->speech": 1}},
            "names a modality t",
        ),
        ({"tasks": {"speech->text": 0}}, "at least one task a weight above zero"),
        (
            {"towers": {"text": "t", "speech": {"source": "s", "train": "full", "config": {"dtype": "float16"}}}},
            "towers.speech.config: dtype float16 is too narrow for training",
        ),
        ({"training": {"patience": 2}, "data": {"source": "x", "validation": None}}, "training.patience"),
    ],
)
def test_recipes_that_cannot_work(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check_recipe(tiny_recipe(tmp_path / "m", **changes))


def test_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipper_lm.jobs.materials.build_model", lambda _: pytest.fail("work began"))
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists"):
        fuse(tiny_recipe(tmp_path / "there"))
    with pytest.raises(ValueError, match="nothing to resume"):
        fuse(tiny_recipe(tmp_path / "m"), resume=True)
    with pytest.raises(ValueError, match=r"training.arguments: .*bf17"):
        fuse(tiny_recipe(tmp_path / "m", training={"arguments": {"bf17": True}}))
    with pytest.raises(ValueError, match=r"no file or folder"):
        fuse(tiny_recipe(tmp_path / "m", data=str(tmp_path / "nowhere")))
    towers = {"text": str(tmp_path / "m" / "text"), "speech": str(workshop() / "speech")}
    with pytest.raises(ValueError, match="would replace tower 'text'"):
        fuse(tiny_recipe(tmp_path / "m", towers=towers))
    within = working_folder(tmp_path / "m") / "checkpoint-2"  # which is emptied before, and gone after
    for field, recipe in (
        ("tower 'text'", {"towers": towers | {"text": str(within)}}),
        ("judge", {"judge": str(within)}),
        ("data.source", {"data": str(within)}),
        ("pseudo_labels.model", {"pseudo_labels": {"task": "speech->text", "model": str(within)}}),
    ):
        with pytest.raises(ValueError, match=f"would replace {field}"):
            fuse(tiny_recipe(tmp_path / "m", **recipe))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("file", "text", "message"), [(b"RIFF", "one", "csv:3: .*speech"), (None, "ω", "csv:3: .*ω")])
def test_bad_rows_are_named(file: bytes | None, text: str, message: str, tmp_path: Path) -> None:
    good = (workshop() / "data" / "train" / "0.wav").read_bytes()
    (tmp_path / "0.wav").write_bytes(good)
    (tmp_path / "1.wav").write_bytes(file or good)
    (tmp_path / "metadata.csv").write_text(f"file_name,transcription\n0.wav,one\n1.wav,{text}\n")
    data = {"source": str(tmp_path), "validation": None}
    with pytest.raises(ValueError, match=message):
        fuse(tiny_recipe(tmp_path / "m", data=data))


def test_a_path_is_no_recipe(tmp_path: Path) -> None:
    """It ended in an AttributeError, and so did overrides that are one string."""
    with pytest.raises(ValueError, match=r"give a FuseRecipe, got 'recipe.yaml'; read_recipe"):
        fuse("recipe.yaml")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="overrides must be a list"):
        read_recipe(tmp_path / "recipe.yaml", "data=x")
    with pytest.raises(ValueError, match="zips must be ZipSpecs"):
        ZipperModel.fuse({n: workshop() / n for n in ("text", "speech")}, zips=[{"layers": 2}])  # type: ignore[list-item]
