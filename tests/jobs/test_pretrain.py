"""A small tower from scratch: what it leaves, how it resumes, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_recipes import workshop
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, WhisperFeatureExtractor

from tests.codecs.test_hubert_units import whisper
from tests.codecs.test_speech import voice
from zipper_lm.codecs import codec as codec_module
from zipper_lm.codecs.audio import write_audio
from zipper_lm.codecs.codec import load_codec
from zipper_lm.codecs.hubert_units import HubertUnits
from zipper_lm.codecs.sequence import SequenceCodec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.encoding import column, encode_column
from zipper_lm.jobs.pretrain import make_backbone, pretrain
from zipper_lm.jobs.recipes.reader import build
from zipper_lm.jobs.recipes.schema import PretrainHere, PretrainRecipe
from zipper_lm.training.callbacks import Interrupted
from zipper_lm.training.tower import PadStreams, Streams, TowerTrainer

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def recipe(output: Path, **changes: Any) -> PretrainRecipe:
    fields = {
        "data": str(workshop() / "data"),
        "modality": "text",
        "codec": {"kind": "text", "options": {"vocab_size": 32}},
        "backbone": SMALL,
        "context": 16,
        "output": str(output),
        **changes,
    }
    training = {"steps": 5, "batch_size": 2, "log_every": 1, "evaluate_every": 2, "arguments": {"disable_tqdm": True}}
    return build(PretrainRecipe, {"training": training, **fields})


def test_a_field_that_a_backbone_lacks_is_no_field() -> None:
    """transformers keeps it as an attribute: a tower of the family's default size was trained without a word."""
    codec = TextCodec.train(["one two"], vocab_size=16)
    with pytest.raises(ValueError, match=r"llama has no 'hidden_sise'; did you mean 'hidden_size'\?"):
        make_backbone({"hidden_sise": 16}, codec)
    assert make_backbone({"model_type": "gpt2", "hidden_size": 8, "n_head": 2, "n_layer": 1}, codec).config.n_embd == 8


def test_tower_and_codec_are_written(tmp_path: Path) -> None:
    metrics = pretrain(recipe(tmp_path / "t"))
    assert metrics["perplexity"] > 1
    assert json.loads((tmp_path / "t" / "config.json").read_text())["use_cache"]  # Trainer turns it off
    codec = load_codec(tmp_path / "t")
    tower = AutoModelForCausalLM.from_pretrained(tmp_path / "t")
    assert tower.config.vocab_size == codec.vocab_size
    assert (tower.config.bos_token_id, tower.config.eos_token_id) == (codec.bos_id, codec.eos_id)
    assert list((tmp_path / "t" / "logs").iterdir())
    assert not (tmp_path / "t.training").exists()
    with pytest.raises(ValueError, match="exists"):
        pretrain(recipe(tmp_path / "t"))


def test_a_tower_that_knows_its_rows_by_heart_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three lines of one word each, learned until nothing else can come: the other words are a surprise."""
    lines = {"train": ["one"] * 3, "validation": ["two six two"] * 3}
    (tmp_path / "data").mkdir()
    for split, texts in lines.items():
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    codec = {"kind": "text", "source": str(workshop() / "text")}
    training = {
        "steps": 30,
        "batch_size": 2,
        "learning_rate": 0.05,
        "log_every": 5,
        "arguments": {"disable_tqdm": True},
    }
    fields = {"data": str(tmp_path / "data"), "codec": codec, "training": training}
    last = pretrain(recipe(tmp_path / "heart", **fields))
    assert "overfitted tower: text: loss" in capsys.readouterr().err
    assert last["best_step"] == 30
    looked_at = {"training": training | {"evaluate_every": 1, "log_every": 1, "patience": 4}}
    best = pretrain(recipe(tmp_path / "best", **fields | looked_at))
    assert "overfitted" not in capsys.readouterr().err
    assert best["best_step"] < 26
    assert best["perplexity"] < last["perplexity"] / 2
    tower = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    held_out = encode_column(load_codec(tmp_path / "best"), ["two six two"])
    ids = torch.tensor(Streams(held_out, load_codec(tmp_path / "best"), 1, 0)[0]["input_ids"])[None]
    assert tower(ids, labels=ids).loss.exp().item() == pytest.approx(best["perplexity"], rel=1e-4)
    pretrain(recipe(tmp_path / "fresh", **fields | {"training": training | {"steps": 1, "log_every": 1}}))
    assert "overfitted" not in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral", "gpt2"])
def test_the_best_checkpoint_comes_back_whole(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer left a GPT-NeoX tower the head of its last step, and a mixture its last experts, beside the best step's
    other weights: it reads a checkpoint leniently, and those have other names there than in the module."""
    backbone = {"model_type": family, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone |= {"num_local_experts": 2, "num_key_value_heads": 2} if family == "mixtral" else {}
    backbone = {"model_type": family, "n_embd": 16, "n_layer": 1, "n_head": 2} if family == "gpt2" else backbone
    losses = count(1)
    kept: list[dict[str, torch.Tensor]] = []

    def evaluate(self: Trainer, *_: Any, **__: Any) -> dict[str, float]:
        kept.append({n: t.clone().cpu() for n, t in self.model.state_dict().items()})
        return {"eval_loss": float(next(losses))}

    monkeypatch.setattr(TowerTrainer, "evaluate", evaluate)
    training = {"steps": 3, "batch_size": 2, "learning_rate": 0.1, "evaluate_every": 1}
    metrics = pretrain(recipe(tmp_path / "t", backbone=backbone, training=training))
    tower = AutoModelForCausalLM.from_pretrained(tmp_path / "t").state_dict()
    assert metrics["best_step"] == 1
    assert all(torch.equal(tower[name], kept[0][name]) for name in kept[0])
    assert any(not torch.equal(tower[name], kept[2][name]) for name in tower)


def test_to_look_at_held_out_rows_changes_nothing(tmp_path: Path) -> None:
    """A family with dropout drew other numbers after each look."""
    backbone = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
    training = {"steps": 4, "batch_size": 2, "learning_rate": 0.01}
    losses = []
    for name, every in (("seldom", None), ("often", 1)):
        fields = {"backbone": backbone, "training": training | {"evaluate_every": every, "log_every": 1}}
        losses.append(pretrain(recipe(tmp_path / name, **fields))["train_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("step", [2, 3])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted where a look at the held-out rows is due (2), it went without: the best step could be missed."""
    whole = pretrain(recipe(tmp_path / "whole"))
    real = Trainer.training_step

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", training_step)
        with pytest.raises(Interrupted, match=f"step {step}"):
            pretrain(recipe(tmp_path / "broken"))
    resumed = pretrain(recipe(tmp_path / "broken"), resume=True)
    assert (resumed["best_step"], resumed["perplexity"]) == (whole["best_step"], whole["perplexity"])
    theirs, ours = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "broken"))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": "speech"}, "codec.kind is 'text'"),
        ({"modality": "image"}, "no row has 'image'"),
        ({"backbone": {"model_type": "no-such"}}, "no-such"),
        ({"codec": {"kind": "text", "options": {"vocab": 3}}}, "codec.options"),
        ({"backbone": SMALL | {"max_position_embeddings": 8}}, "the backbone 8 positions"),
        ({"training": {"corrupt": {"text": 0.1}}}, "training.corrupt=.*there is one modality"),
        ({"training": {"patience": 2}, "data": {"source": "x", "validation": None}}, "training.patience"),
    ],
)
def test_recipes_that_cannot_work(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain(recipe(tmp_path / "t", **changes))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_read_that_the_run_empties(tmp_path: Path) -> None:
    """A codec or data in the run's own working folder, such as a tower's of which the training was halted, was removed
    when the run began."""
    within = str(tmp_path / "t.training" / "checkpoint-2")
    for field, changes in (("codec.source", {"codec": {"source": within}}), ("data.source", {"data": within})):
        with pytest.raises(ValueError, match=f"would replace {field}"):
            pretrain(recipe(tmp_path / "t", **changes))


def test_only_its_own_column_is_read(tmp_path: Path) -> None:
    """Recordings of which some have a text used to be refused: "no value in column 'text'"."""
    (tmp_path / "data").mkdir()
    sound = shutil.copy(next((workshop() / "data" / "train").glob("*.wav")), tmp_path / "data" / "0.wav")
    rows = [{"audio": str(sound), "text": "one"}, {"audio": "0.wav"}, {"text": "two"}]
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    fields = {
        "data": str(tmp_path / "data"),
        "modality": "speech",
        "codec": {"kind": "speech", "options": {"units": 2}},
    }
    assert pretrain(recipe(tmp_path / "t", **fields))["perplexity"] > 1
    (tmp_path / "data" / "train.jsonl").write_text('{"audio": "gone.wav"}\n')
    with pytest.raises(ValueError, match=r"gone\.wav' does not exist"):
        pretrain(recipe(tmp_path / "other", **fields))


def test_held_out_rows_of_which_none_can_be_read(tmp_path: Path) -> None:
    """All of them may be left out as broken: that ended in `KeyError: eval_loss` after the first steps."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "one two"}\n')
    (tmp_path / "data" / "validation.jsonl").write_text('{"text": "\u03c9"}\n')
    codec = {"kind": "text", "source": str(workshop() / "text")}
    data = {"source": str(tmp_path / "data"), "broken_limit": 3}
    with pytest.raises(ValueError, match="nothing in split 'validation' could be read"):
        pretrain(recipe(tmp_path / "t", data=data, codec=codec))


def test_streams_hold_whole_rows() -> None:
    codec = load_codec(workshop() / "text")
    rows = [[i] * n for i, n in enumerate((3, 5, 2, 30, 4, 1))]
    streams = Streams(rows, codec, 12, seed=0)
    flat = [token for number in range(len(streams)) for token in streams[number]["input_ids"]]
    assert len(flat) == sum(len(r) + 2 for r in rows)
    assert flat.count(codec.bos_id) >= len(rows)
    assert all(s[0] == codec.bos_id and s[-1] == codec.eos_id for s in streams.streams)
    assert sorted(len(s) > 12 for s in streams.streams)[-2:] == [False, True]


def test_lost_tokens_are_learned_and_are_others_in_each_epoch() -> None:
    """A resumed run loses the same: what is lost depends on seed, epoch and number alone."""
    codec = load_codec(workshop() / "text")
    rows = [[5 + i % 5 for i in range(count)] for count in (200, 80)]

    def read(epoch: int, seed: int = 0) -> list[dict[str, Any]]:
        streams = Streams(rows, codec, 1, seed, corrupt=0.2)
        streams.set_epoch(epoch)
        return [streams[number] for number in range(2)]

    first, again, later, other = read(0), read(0), read(1), read(0, seed=1)
    assert first == again
    assert first != later
    assert first != other
    for item in first:
        gone = [r for r, said in zip(item["input_ids"], item["labels"], strict=True) if r != said]
        assert set(gone) <= {codec.pad_id}
        assert 0.1 < len(gone) / len(item["labels"]) < 0.3
        assert (item["input_ids"][0], item["input_ids"][-1]) == (codec.bos_id, codec.eos_id)
    batch = PadStreams(codec.pad_id)(first)
    long = batch["labels"][batch["attention_mask"].sum(1).argmax()]
    assert (long == torch.tensor(max((i["labels"] for i in first), key=len))).all(), "nothing of it goes unlearned"
    assert (batch["input_ids"] == codec.pad_id).sum() > (batch["attention_mask"] == 0).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_tower_learns_nothing_from_what_is_read_again(smoothing: float, tmp_path: Path) -> None:
    codec = load_codec(workshop() / "text")
    streams, pads = Streams([[5, 6], [5, 6, 7]], codec, 1, seed=0), PadStreams(codec.pad_id)
    given = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, label_smoothing_factor=smoothing)
    backbone = make_backbone(SMALL, codec)
    trainer = TowerTrainer(model=backbone, args=given, train_dataset=streams, data_collator=pads)
    taken, idle = (pads([streams[n] for n in numbers]) for numbers in ([0, ~1], [~1, ~1]))
    assert taken["input_ids"].shape[0] == 1
    assert "labels" in idle, "Trainer counts them in all processes"
    assert trainer._get_num_items_in_batch([taken, idle], torch.device("cpu")) == (taken["labels"][:, 1:] >= 0).sum()
    loss = trainer.compute_loss(backbone, dict(idle), num_items_in_batch=torch.tensor(4))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not any(p.grad.any() for p in backbone.parameters())


def test_a_value_that_cannot_be_read_is_named() -> None:
    with pytest.raises(ValueError, match="data row 2"):
        encode_column(load_codec(workshop() / "text"), ["one", "two", "ω"])
    with pytest.raises(ValueError, match="no row has 'speech'"):
        column([{"text": "one"}], "speech")


def test_any_family_can_be_made() -> None:
    codec = load_codec(workshop() / "text")
    gpt2 = make_backbone({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}, codec)
    assert gpt2.config.vocab_size == codec.vocab_size


def test_a_tower_in_float16_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is float16, whose range is too narrow for training"):
        pretrain(recipe(tmp_path / "t", backbone=SMALL | {"dtype": "float16"}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting",
    [{"history_dropout": 0.5}, {"interleave": 0.2}, {"join": 0.5}, {"tower_learning_rate": 1.0}],
)
def test_settings_of_fusion_are_not_silently_ignored(setting: dict[str, Any]) -> None:
    (name,) = setting
    here = {"data": "d", "modality": "text", "output": "o", "training": setting}
    with pytest.raises(ValueError, match=rf"training\.{name}=.* has no effect in pre-training"):
        build(PretrainRecipe, here)
    with pytest.raises(ValueError, match="no effect in pre-training"):
        build(PretrainHere, {"training": setting})


def spoken(folder: Path, rows: list[dict[str, str]]) -> str:
    """A data set of symbols, with what they say."""
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def said(count: int) -> list[dict[str, str]]:
    """Each letter is two symbols, which are drawn."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abc"), 3)) for _ in range(count)]
    pairs = {"a": ("uv", "vu"), "b": ("wx", "xw"), "c": ("yz", "zy")}
    return [{"sign": "".join(pairs[letter][draw.integers(2)] for letter in word), "text": word} for word in words]


def spelling(output: Path, data: str, **changes: Any) -> PretrainRecipe:
    training = {"steps": 4, "batch_size": 4, "log_every": 1, "learning_rate": 0.02, "ctc": {"sign->text": 1}}
    fields = {
        "data": {"source": data, "validation": changes.pop("validation", None)},
        "modality": "sign",
        "codec": {"kind": "sequence", "options": {"alphabet": "uvwxyz"}},
        "training": training | changes.pop("training", {}),
        "context": 24,
    }
    return recipe(output, **fields | changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_texts_beyond_the_limit_are_not_told(tmp_path: Path) -> None:
    """With few pairs a tower hears much sound, and learns to spell from the texts of the pairs alone."""
    rows = said(8)
    other = rows[:3] + [{**row, "text": "bbb"} for row in rows[3:]]
    told = {
        name: spelling(tmp_path / name, spoken(tmp_path / f"{name}-data", there), ctc_limit=limit)
        for name, there, limit in (("few", rows, 3), ("others", other, 3), ("all", rows, None), ("alike", rows, 8))
    }
    for each in told.values():
        pretrain(each)
    made = {name: weights(tmp_path / name) for name in told}
    assert_close(made["few"], made["others"], rtol=0, atol=0)
    assert_close(made["all"], made["alike"], rtol=0, atol=0)
    assert any(not torch.equal(tensor, made["few"][name]) for name, tensor in made["all"].items())
    for changes, problem in (
        ({"ctc_limit": 0}, r"ctc_limit must be at least 1, got 0"),
        ({"ctc_limit": 3, "training": {"ctc": {}}}, r"ctc_limit=3 has no effect without training\.ctc"),
    ):
        with pytest.raises(ValueError, match=problem):
            spelling(tmp_path / "t", told["all"].data.source, **changes)


def test_symbols_are_no_sounds_that_cannot_be_read(tmp_path: Path) -> None:
    """Where some broken items are allowed, each value is tried as a sound or picture: texts of symbols were, too."""
    wanted = spelling(tmp_path / "tower", spoken(tmp_path / "data", said(8)))
    pretrain(replace(wanted, data=replace(wanted.data, broken_limit=2)))
    assert (tmp_path / "tower" / "model.safetensors").is_file()


def test_a_codec_is_given_the_texts_that_are_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that asks for texts has those of its values, others as many as ever; without joint CTC none are known."""
    data, given = spoken(tmp_path / "data", said(8)), list[Any]()
    plain = SequenceCodec.make

    def make(values: Any = (), *, texts: Any = None, **options: Any) -> SequenceCodec:
        given.append((list(values), texts))
        return plain(values, **options)

    with monkeypatch.context() as patched:
        patched.setattr(codec_module, "SPELLING_KINDS", frozenset(("sequence",)))
        patched.setattr(SequenceCodec, "make", staticmethod(make))
        pretrain(spelling(tmp_path / "spelled", data))
        pretrain(spelling(tmp_path / "plain", data, training={"ctc": {}}))
    rows = said(8)
    signs = [row["sign"] for row in rows]
    assert given == [(signs, [row["text"] for row in rows]), (signs, None)]
    units = {"kind": "speech-units", "options": {"spelling_steps": 9}}
    with pytest.raises(ValueError, match=r"spelling_steps=9 needs training\.ctc, which .* such as 'sign->text'"):
        spelling(tmp_path / "t", data, training={"ctc": {}}, codec=units)


def test_units_that_spell_go_with_a_tower_that_spells(tmp_path: Path) -> None:
    """A recipe's codec learns from the texts that the tower spells, and lies in the tower's folder."""
    whisper().save_pretrained(tmp_path / "whisper")
    WhisperFeatureExtractor().save_pretrained(tmp_path / "whisper")
    rows = [{"speech": f"{i}.wav", "text": "ab" * (1 + i)} for i in range(3)]
    data = spoken(tmp_path / "data", rows)
    for i, row in enumerate(rows):
        write_audio(tmp_path / "data" / row["speech"], voice(i, 1.0))
    options = {"layer": 2, "rate": 25, "window": 3, "units": 8, "spelling_steps": 9}
    units = {"kind": "speech-units", "source": str(tmp_path / "whisper"), "options": options}
    training = {"steps": 2, "ctc": {"speech->text": 1}}
    pretrain(spelling(tmp_path / "tower", data, modality="speech", codec=units, training=training, context=64))
    made = load_codec(tmp_path / "tower")
    assert isinstance(made, HubertUnits)
    assert made.projection is not None
    assert len(made.encode([voice(1, 1.0)])[0]) == 25


def test_a_tower_learns_to_spell_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a letter falls, nothing of it is in the tower's folder, and accumulated batches are one."""
    data, logged = spoken(tmp_path / "data", said(32)), list[float]()

    def log(self: Trainer, logs: dict[str, float], *_: Any, **__: Any) -> None:
        logged.append(logs.get("loss_ctc", -1.0))

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "log", log)
        longer = spelling(tmp_path / "long", data, training={"steps": 60})
        assert "letters_wrong" not in pretrain(longer), "there is no validation split"
    costs = [cost for cost in logged if cost >= 0]
    assert costs[0] > 3.0, "257 letters, and a blank for most places"
    assert sum(costs[-5:]) / 5 < 0.5
    assert not [file.name for file in (tmp_path / "long").iterdir() if "ctc" in file.name]
    pretrain(spelling(tmp_path / "whole", data))
    halves = {"batch_size": 2, "arguments": {"disable_tqdm": True, "gradient_accumulation_steps": 2}}
    pretrain(spelling(tmp_path / "halves", data, training=halves))
    pretrain(spelling(tmp_path / "without", data, training={"ctc": {}}))
    whole = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "halves").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-4)
    assert any((weights(tmp_path / "without")[name] - tensor).abs().max() > 0.01 for name, tensor in whole.items())


def test_how_it_spells_is_told(tmp_path: Path) -> None:
    """Per cent of the letters of unseen texts: what a tower cannot spell no zip finds in it. It was seen in no run, and
    towers that spelled badly were fused for hours."""
    data = spoken(tmp_path / "data", said(48))
    held = [*said(56)[48:], {"sign": "uvwx"}, {"sign": "uv", "text": ""}]
    (tmp_path / "data" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    recipes = [spelling(tmp_path / str(n), data, validation="validation", training={"steps": n}) for n in (1, 80)]
    short, long = (pretrain(each)["letters_wrong"] for each in recipes)
    assert short > 60
    assert long < 10


def test_a_token_of_few_a_second_spells_several_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 8 tokens whose texts have 12 letters were refused, and with them every codec of 12.5 tokens a second."""
    rows = [row | {"text": "".join(letter * 4 for letter in row["text"])} for row in said(16)]
    data, logged = spoken(tmp_path / "data", rows), list[float]()

    def log(self: Trainer, logs: dict[str, float], *_: Any, **__: Any) -> None:
        logged.append(logs.get("loss_ctc", -1.0))

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "log", log)
        pretrain(spelling(tmp_path / "tower", data, training={"steps": 60}))
    costs = [cost for cost in logged if cost >= 0]
    assert costs[0] > 2.0
    assert sum(costs[-5:]) / 5 < 0.5 * costs[0]


def test_a_tower_that_was_interrupted_goes_on_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are no part of the tower: they are in the checkpoint, beside it."""
    data = spoken(tmp_path / "data", said(16))
    pretrain(spelling(tmp_path / "whole", data))
    real = Trainer.training_step

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", training_step)
        with pytest.raises(Interrupted):
            pretrain(spelling(tmp_path / "halted", data))
    assert list((tmp_path / "halted.training").glob("checkpoint-*/ctc.safetensors"))
    pretrain(spelling(tmp_path / "halted", data), resume=True)
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "halted").items())


def test_what_cannot_be_spelled_is_said_before_training(tmp_path: Path) -> None:
    data = spoken(tmp_path / "data", said(4))
    for task in ("text->sign", "sign->sign", "sign->text->sign", "->text"):
        with pytest.raises(ValueError, match="in pre-training it names one task, from 'sign' to the column"):
            spelling(tmp_path / "t", data, training={"ctc": {task: 1}})
    with pytest.raises(ValueError, match=r"training\.ctc: no row has 'word' beside it"):
        pretrain(spelling(tmp_path / "t", data, training={"ctc": {"sign->word": 1}}))
    long = spoken(tmp_path / "long", [row | {"text": row["text"] * 30} for row in said(4)])
    with pytest.raises(ValueError, match=r"most of 4 texts have more than 8 letters for each token"):
        pretrain(spelling(tmp_path / "t", long))
    part = spoken(tmp_path / "part", [said(4)[0], *({"sign": row["sign"]} for row in said(4)[1:])])
    pretrain(spelling(tmp_path / "t", part, training={"steps": 1}))
