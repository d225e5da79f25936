"""A published speech recogniser as a judge; here a small CTC checkpoint of the same classes, written by the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_backbone, tiny_whisper
from tiny_recipes import tiny_recipe
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
)

from zipper_lm.evaluation.judges import check_writes, load_judge
from zipper_lm.evaluation.public_recogniser import PublicRecogniser
from zipper_lm.jobs.fuse import fuse

LETTERS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"EINORSTWX")


def checkpoint(folder: Path, says: str, rate: int = 16_000) -> Path:
    """A wav2vec 2.0 that hears one letter in everything."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=rate).save_pretrained(folder)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(LETTERS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(20, 16),
        conv_kernel=(20, 16),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
    )
    model = Wav2Vec2ForCTC(config)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-9.0)
        model.lm_head.bias[LETTERS.index(says)] = 9.0
    model.save_pretrained(folder)
    return folder


def test_what_it_hears_is_in_lower_case(tmp_path: Path) -> None:
    judge = load_judge(checkpoint(tmp_path / "w", "W"))
    assert isinstance(judge, PublicRecogniser)
    noise = np.random.default_rng(0)
    assert judge.transcribe([noise.normal(size=n).astype(np.float32) for n in (8000, 20000)]) == ["w", "w"]


def test_its_digest_is_of_its_weights(tmp_path: Path) -> None:
    first, other = (load_judge(checkpoint(tmp_path / s, s)) for s in "WX")
    assert first.digest() == load_judge(tmp_path / "W").digest()
    assert first.digest() != other.digest()


def test_one_that_wants_another_rate_gets_it(tmp_path: Path) -> None:
    judge = load_judge(checkpoint(tmp_path / "w", "W", rate=8000))
    heard: list[int] = []
    assert isinstance(judge, PublicRecogniser)
    inner = judge.recogniser
    judge.recogniser = type("Spy", (), {"feature_extractor": inner.feature_extractor, "type": "ctc"})()
    type(judge.recogniser).__call__ = lambda _, said: heard.append(len(said["raw"])) or inner(said)  # type: ignore
    assert judge.transcribe([np.zeros(16000, np.float32)]) == ["w"]
    assert heard == [8000]


def test_a_fusion_is_scored_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = str(checkpoint(tmp_path / "w", "W"))
    monkeypatch.setattr(PublicRecogniser, "_heard", lambda *_: "six six six six six six")
    record = fuse(tiny_recipe(tmp_path / "m", judge=judge, training={"evaluate_every": 2}))
    (scores,) = [entry for entry in record["history"] if "eval_wer" in entry]
    assert scores["eval_wer/text->speech"] > 100.0  # as nothing else would give


def test_what_is_no_recogniser_is_refused(tmp_path: Path) -> None:
    tiny_backbone("llama", 20).save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match=r"judge .*llm.*model_type 'llama' is no speech recogniser's"):
        load_judge(tmp_path / "llm")
    with pytest.raises(ValueError, match=r"judge .*no such folder"):
        load_judge(tmp_path / "missing")


def test_an_encoder_alone_is_refused(tmp_path: Path) -> None:
    """Its head was drawn at random, with a note in transformers' log: each loading was another judge."""
    folder = checkpoint(tmp_path / "w", "W")
    Wav2Vec2Model.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"judge .*lacks 2 tensors of Wav2Vec2ForCTC, such as \['lm_head.bias'"):
        load_judge(folder)


@pytest.mark.parametrize(
    ("missing", "words"),
    [("preprocessor_config.json", "judge .*preprocessor_config"), ("tokenizer_config.json", "judge .*w'")],
)
def test_what_lies_beside_the_weights_is_needed(tmp_path: Path, missing: str, words: str) -> None:
    folder = checkpoint(tmp_path / "w", "W")
    for file in [folder / missing, *(folder.glob("*vocab*") if "tokenizer" in missing else [])]:
        file.unlink()
    with pytest.raises(ValueError, match=words):
        load_judge(folder)


def test_a_judge_of_another_language_is_refused(tmp_path: Path) -> None:
    """Every word was an error, and nobody said why."""
    judge = load_judge(checkpoint(tmp_path / "w", "W"))
    assert isinstance(judge, PublicRecogniser)
    assert judge.letters() == frozenset("einorstwx")
    check_writes(judge, ["six one", "two, 7!", "h"])
    with pytest.raises(ValueError, match=r"judge: it has no letters for 80 % of the texts, such as \['а', 'в'"):
        check_writes(judge, ["два один шесть", "one"])


def preprocessor(folder: Path, **changes: Any) -> Path:
    """The folder, with another preprocessor."""
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("rate", "told"), [(0, "0"), ("fast", "'fast'"), (None, "None"), (10**9, "at most 1048576 Hz")]
)
def test_a_rate_that_is_none_is_told_when_it_is_loaded(rate: Any, told: str, tmp_path: Path) -> None:
    """It was met with the first sound, after training, as a TypeError of the resampler."""
    folder = preprocessor(checkpoint(tmp_path / "w", "W"), sampling_rate=rate)
    with pytest.raises(ValueError, match=rf"judge .*its preprocessor: sampling_rate must be .*{told}"):
        load_judge(folder)


def test_a_whisper_whose_parts_do_not_belong_together(tmp_path: Path) -> None:
    """Without the files of its tokenizer it heard nothing in anything; with another's preprocessor the first sound,
    after training, was a RuntimeError of a convolution."""
    assert isinstance(load_judge(tiny_whisper(tmp_path / "whole")), PublicRecogniser)
    with pytest.raises(ValueError, match=r"cannot hear a second of silence: .*128 channels"):
        load_judge(preprocessor(tiny_whisper(tmp_path / "mels"), feature_size=128))
    bare = tiny_whisper(tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"judge .*bare': .*: it has no preprocessor_config\.json, which says what sound it hears"
    ):
        load_judge(bare)
    mute = tiny_whisper(tmp_path / "mute")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (mute / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"its tokenizer has \d+ tokens, the model writes \d+|cannot be loaded"):
        load_judge(mute)


def test_a_whisper_for_english_is_no_judge_of_another_script(tmp_path: Path) -> None:
    """One that was made for many languages is believed."""
    judge = load_judge(tiny_whisper(tmp_path / "english"))
    assert isinstance(judge, PublicRecogniser)
    check_writes(judge, ["Café, one two"])
    with pytest.raises(ValueError, match="it is of another language"):
        check_writes(judge, ["один два"])
    judge.recogniser.model.generation_config.is_multilingual = True
    check_writes(judge, ["один два"])


def test_what_is_no_recogniser_is_refused_by_its_kind(tmp_path: Path) -> None:
    tiny_backbone("llama", 31, 2).save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match="model_type 'llama' is no speech recogniser's"):
        load_judge(tmp_path / "llm")
