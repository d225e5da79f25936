"""The demo with an LLM, at toy size, beside a stand-in: it hears, answers as itself, speaks, and leaves a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from zipper_lm import ZipperModel
from zipper_lm.codecs.text import TextCodec
from zipper_lm.demo import llm as demo
from zipper_lm.demo.llm import (
    CAPITALS,
    LlmSizes,
    check_llm,
    demo_llm,
    sentences,
    upper_layers,
    utterances,
    zips_of,
)
from zipper_lm.fusion.zip_spec import EMBEDDINGS


def stand_in(folder: Path, template: str | None = "{% for m in messages %}{{ m['content'] }}{% endfor %}<s>") -> Path:
    """A random LLM that can spell the sentences, whose PAD is its EOS."""
    torch.manual_seed(0)
    codec = TextCodec.train(sentences(), vocab_size=64)
    codec.tokenizer.chat_template, codec.tokenizer.pad_token = template, codec.tokenizer.eos_token
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    ids = {f"{k}_token_id": getattr(codec, f"{k}_id") for k in ("bos", "eos", "pad")}
    LlamaForCausalLM(LlamaConfig(vocab_size=codec.vocab_size, **shape, **ids)).save_pretrained(folder)
    codec.tokenizer.save_pretrained(folder)
    return folder


def test_it_runs_from_the_shipped_parts_to_a_page(tmp_path: Path) -> None:
    results = demo_llm(
        str(stand_in(tmp_path / "llm")), tmp_path / "out", console=Console(quiet=True), sizes=LlmSizes.toy()
    )
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["frozen_unchanged"]
    assert results["llm"] == "llm"  # no folder of this machine
    assert {"asr_wer", "tts_wer", "oracle_wer", "judge_wer_on_originals", "right", "as_typed"} <= results.keys()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<section>") == results["questions"]
    for number in range(results["questions"]):
        for name in ("question", "answer"):
            assert f"audio/{number:02d}-{name}.wav" in page
            assert (tmp_path / "out" / "audio" / f"{number:02d}-{name}.wav").is_file()
    made = ZipperModel.from_pretrained(tmp_path / "out" / "model")
    assert made.names == ["speech", "text"]
    assert {m for _, m in made.layer_pairs["speech", "text"]} == {EMBEDDINGS}
    assert not (tmp_path / "out.work").exists()
    assert all(len(line) <= 80 for line in demo._told(results))
    with pytest.raises(ValueError, match="exists"):
        demo_llm("x", tmp_path / "out")


def test_a_base_model_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no chat template; an instruct model is needed"):
        demo_llm(str(stand_in(tmp_path / "llm", None)), tmp_path / "out")
    with pytest.raises(ValueError, match="no tokenizer"):
        check_llm(str(tmp_path / "nowhere"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_an_llm_is_float32_where_its_own_dtype_is_slow(
    dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLMs are published in bfloat16, which a processor with AVX2 alone would train beside for hours."""
    source = stand_in(tmp_path / "llm")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for multiplied, expected in ((True, None), (False, {"dtype": "float32"})):
        monkeypatch.setattr(demo, "is_multiplied_here", lambda dtype, m=multiplied: m or dtype != torch.bfloat16)
        _, depth, wide = check_llm(str(source))
        recipe = demo.llm_recipe(str(source), depth, wide, tmp_path, LlmSizes.toy())
        assert recipe.towers["text"].config == expected


def test_a_demo_is_not_gone_on_with_in_another_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was begun where the LLM's own dtype is quick found its checkpoint where it is not, and was refused for a
    recipe that nobody had written."""
    llm, begun = str(stand_in(tmp_path / "llm")), []

    def prepare(work: Path, *_: Any) -> None:
        begun.append(work)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_prepare", prepare)
    for wide in (False, True):
        monkeypatch.setattr(demo, "check_llm", lambda source, w=wide: (None, 4, w))
        with pytest.raises(KeyboardInterrupt):
            demo_llm(llm, tmp_path / "out", console=Console(quiet=True), sizes=LlmSizes.toy())
    assert len(set(begun)) == 2


@pytest.mark.parametrize(("depth", "layers"), [(30, [22, 24, 26, 28]), (8, [1, 3, 5, 7]), (9, [1, 3, 5, 7])])
def test_an_llm_hears_in_its_upper_layers(depth: int, layers: list[int]) -> None:
    assert upper_layers(depth, 4) == layers
    hears, _ = zips_of(LlmSizes(), depth)
    assert hears.resolve({"text": depth, "speech": 4}).layers == layers


def test_no_speaker_is_in_two_splits() -> None:
    said = utterances(LlmSizes())
    speakers = [{u.voice.variant for u in each} for each in said.values()]
    assert not any(a & b for i, a in enumerate(speakers) for b in speakers[i + 1 :])
    assert {u.text for u in said["train"]} == set(sentences())
    assert len(CAPITALS) == 30
