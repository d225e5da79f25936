"""What a text decoder has forgotten: nothing in a frozen tower, and a trained one is told from what it was."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import tiny_backbone
from transformers import LlamaConfig, LlamaForCausalLM

from zipper_lm import ZipperModel
from zipper_lm.codecs.speech import SpeechCodec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.sources.readers import read_rows
from zipper_lm.evaluation.forgetting import Question, measure_forgetting, read_questions
from zipper_lm.models.baseline.expand import expand

TEXTS = [row["text"] for row in read_rows("experiments/unseen-text", split="test")]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ bos_token }}{% endfor %}"


@cache
def codec() -> TextCodec:
    return TextCodec.train([*TEXTS, *(question.text for question in read_questions())], vocab_size=128)


def decoder(folder: Path) -> Path:
    """A random one with a tokenizer that can spell all questions."""
    torch.manual_seed(0)
    ids = {f"{k}_token_id": getattr(codec(), f"{k}_id") for k in ("bos", "eos", "pad")}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=codec().vocab_size, initializer_range=0.4, **shape, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    codec().save_pretrained(folder)
    return folder


def sounds() -> SpeechCodec:
    return SpeechCodec.fit([torch.randn(8000).numpy() for _ in range(2)], units=4)


def test_a_frozen_tower_forgets_nothing(tmp_path: Path) -> None:
    tiny_backbone("llama", 31, 2).save_pretrained(tmp_path / "speech")
    model = ZipperModel.fuse({"text": decoder(tmp_path / "text"), "speech": tmp_path / "speech"})
    assert len(read_questions()) == 200
    found = measure_forgetting(model, TEXTS[:8], read_questions()[::5])
    told = found.summary()
    assert (told["questions"], told["same_answers"], told["changed"]) == (40, 40, [])
    assert found.before == found.after
    assert told["before"]["perplexity"] > 100, "it is random"
    assert len(set(found.before.answers)) > 20, "and says something else to each"


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_single_decoder_is_asked_as_what_it_was(train: str, tmp_path: Path) -> None:
    """Only what training changed counts, not that its vocabulary has grown."""
    codecs = {"text": codec(), "speech": sounds()}
    model = expand("text", str(decoder(tmp_path / "text")), codecs, train=train)
    with torch.no_grad():  # as if it had learned to write nothing but sounds
        model.get_output_embeddings().weight[codec().vocab_size :] = 3.0
    asked = read_questions()[:8]
    told = measure_forgetting(model, TEXTS[:4], asked).summary()
    assert told["same_answers"] == 8
    assert told["after"]["perplexity"] == pytest.approx(told["before"]["perplexity"], rel=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (train == "full" and "proj" in name):
                parameter.add_(0.3)
    told = measure_forgetting(model, TEXTS[:4], asked).summary()
    assert told["same_answers"] < 8
    assert told["after"]["perplexity"] != pytest.approx(told["before"]["perplexity"], rel=1e-3)
    assert told["changed"][0].keys() == {"question", "before", "after"}


def test_a_chat_template_is_used(tmp_path: Path) -> None:
    tiny_backbone("llama", 31, 2).save_pretrained(tmp_path / "speech")
    model = ZipperModel.fuse({"text": decoder(tmp_path / "text"), "speech": tmp_path / "speech"})
    asked = read_questions()[:8]
    plain = measure_forgetting(model, TEXTS[:2], asked)
    model.processor.codecs["text"].tokenizer.chat_template = TEMPLATE
    chat = measure_forgetting(model, TEXTS[:2], asked)
    assert chat.before.nats == plain.before.nats
    assert chat.before.answers != plain.before.answers
    assert chat.same == 8


def test_what_writes_in_smaller_pieces_is_asked_as_itself(tmp_path: Path) -> None:
    """With fewer merges a frozen tower's perplexity would be that of a spelling it was never taught."""
    tiny_backbone("llama", 31, 2).save_pretrained(tmp_path / "speech")
    model = ZipperModel.fuse({"text": decoder(tmp_path / "text"), "speech": tmp_path / "speech"})
    whole = measure_forgetting(model, TEXTS[:8], read_questions()[::20])
    assert model.processor is not None
    model.processor.codecs["text"] = TextCodec(codec().tokenizer, merges=2)
    assert measure_forgetting(model, TEXTS[:8], read_questions()[::20]).before == whole.before


def test_text_whose_punctuation_the_tokenizer_lacks_is_read_as_words(tmp_path: Path) -> None:
    model = ZipperModel.fuse({"text": decoder(tmp_path / "text"), "speech": tiny_backbone("llama", 31, 2)})
    texts = "the bread [and] {the} milk", "the bread and the milk"
    odd, plain = (measure_forgetting(model, [text], [Question(text=text)]) for text in texts)
    assert odd.before.nats == plain.before.nats
    assert odd.before.answers[0]
    with pytest.raises(ValueError, match="lacks"):
        measure_forgetting(model, ["жук"])


def test_a_right_answer_holds_whole_words() -> None:
    question = Question(text="What is one plus two?", answers=("3", "three"))
    assert question.is_right("It is Three.")
    assert not question.is_right("It is thirteen or 33.")


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    backbones = {"text": tiny_backbone("llama", codec().vocab_size, 2), "speech": tiny_backbone("llama", 31, 2)}
    model = ZipperModel.fuse(backbones, codecs={"text": codec()})
    with pytest.raises(ValueError, match="not recorded where it came from"):
        measure_forgetting(model, TEXTS[:1])
    with pytest.raises(ValueError, match="no pre-trained decoder 'speech' with a tokenizer"):
        measure_forgetting(model, TEXTS[:1], name="speech")
    with pytest.raises(ValueError, match="no text"):
        measure_forgetting(model, [""])
    (tmp_path / "q.jsonl").write_text(json.dumps({"text": "why", "answers": "because"}))
    with pytest.raises(ValueError, match=r"q.jsonl:1: answers must be a list"):
        read_questions(tmp_path / "q.jsonl")


def test_a_source_that_is_another_now_is_refused(tmp_path: Path) -> None:
    model = expand("text", str(decoder(tmp_path / "text")), {"text": codec(), "speech": sounds()})
    other = LlamaForCausalLM.from_pretrained(tmp_path / "text")
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    other.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="no longer what it came from"):
        measure_forgetting(model, TEXTS[:1])
