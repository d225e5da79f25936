"""Codecs and their towers: units of another codebook are told by trying both; tokenizers may have EOS alone."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from tiny import open_gates, tiny_backbone
from tiny_recipes import say, workshop

from zipper_lm import Document, Segment, TowerSpec, ZipperModel, ZipSpec
from zipper_lm.codecs.speech import SpeechCodec
from zipper_lm.codecs.text import TextCodec


def other_units() -> SpeechCodec:
    noise = np.random.default_rng(1)
    return SpeechCodec.fit([noise.normal(size=16_000).astype(np.float32)] * 2, units=8, frames_per_token=4)


def fused(train: str, codec: SpeechCodec) -> ZipperModel:
    speech = TowerSpec(source=str(workshop() / "speech"), train=train)  # type: ignore[arg-type]
    return ZipperModel.fuse({"text": workshop() / "text", "speech": speech}, codecs={"speech": codec})


def test_units_of_another_codebook_are_refused_beside_a_tower_that_knows_its_own() -> None:
    """As many of them passed for the tower's own, and meant something else to it."""
    for train in ("frozen", "lora"):
        with pytest.raises(ValueError, match="tower 'speech': the codec that is given writes other ids"):
            fused(train, other_units())
    own = SpeechCodec.from_pretrained(workshop() / "speech")
    model = fused("frozen", own)
    assert model.processor is not None
    assert model.processor.codecs["speech"].encode([say("one")]) == own.encode([say("one")])


def test_a_tower_that_is_trained_in_full_may_learn_them(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.WARNING):
        fused("full", other_units())
    assert "units of another codebook" in caplog.text


def bare_llm(folder: Path) -> Path:
    """Whose tokenizer, as those of many chat models, has a template and EOS alone: no BOS, and EOS is PAD."""
    codec = TextCodec.train(["one two six"], vocab_size=32)
    codec.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    codec.tokenizer.bos_token, codec.tokenizer.pad_token = None, codec.tokenizer.eos_token
    tiny_backbone("llama", codec.vocab_size, 2).save_pretrained(folder)
    codec.tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_without_bos_whose_pad_is_eos(tmp_path: Path) -> None:
    """The end of a segment is a target, though it has the id of padding; rows of a batch are written as each alone."""
    model = ZipperModel.fuse(
        {"text": bare_llm(tmp_path / "llm"), "speech": workshop() / "speech"}, zips=ZipSpec(layers=2)
    )
    open_gates(model, 0.5)
    own = model.specials["text"]
    assert own.bos == own.eos == own.pad
    documents = [Document([("speech", say(t)), Segment("text", t, target=True)]) for t in ("one", "six two one")]
    assert model.processor is not None
    labels = model.processor(documents)["text"]["labels"]
    for row, document in zip(labels, documents):
        said = row[row != -100].tolist()
        assert said == [*model.processor.codecs["text"].encode([document[1].value])[0], own.eos]
    asked = [Document([("speech", say(t))]) for t in ("one", "six two one")]
    settings = {"text": {"max_new_tokens": 6}}
    together = model.generate(asked, ["text"], settings=settings)
    alone = [model.generate(document, ["text"], settings=settings) for document in asked]
    assert [d[-1].ids for d in together] == [d[-1].ids for d in alone]
    model.save_pretrained(tmp_path / "model")
    again = ZipperModel.from_pretrained(tmp_path / "model").specials["text"]
    assert (again.bos, again.eos, again.pad) == (own.bos, own.eos, own.pad)
