"""The experiment with a real LLM, dry: the same file, beside tiny stand-ins of SmolLM2 and Whisper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_recipes import workshop
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperFeatureExtractor, WhisperModel

from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.sources.readers import read_rows
from zipper_lm.evaluation import judges
from zipper_lm.evaluation.forgetting import read_questions
from zipper_lm.experiments.plan import read_experiment
from zipper_lm.experiments.report import write_report
from zipper_lm.experiments.run import run_experiment

FILE = Path(__file__).parents[2] / "experiments" / "real-llm.yaml"
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}<s>"


def stand_ins(folder: Path) -> tuple[Path, Path]:
    """Folders of an LLM with a chat template, whose PAD is its EOS, and of a Whisper."""
    torch.manual_seed(0)
    said = [
        row["text"] for split in ("train", "validation", "test") for row in read_rows(workshop() / "data", split=split)
    ]
    prose = [row["text"] for row in read_rows(FILE.parent / "unseen-text", split="test")]
    codec = TextCodec.train(
        [*said, *prose, *(f"Question Answer user {q.text}" for q in read_questions())], vocab_size=96
    )
    codec.tokenizer.chat_template, codec.tokenizer.pad_token = TEMPLATE, codec.tokenizer.eos_token
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    ids = {f"{k}_token_id": getattr(codec, f"{k}_id") for k in ("bos", "eos", "pad")}
    config = LlamaConfig(vocab_size=codec.vocab_size, tie_word_embeddings=True, initializer_range=0.3, **shape, **ids)
    LlamaForCausalLM(config).save_pretrained(folder / "llm")
    codec.tokenizer.save_pretrained(folder / "llm")  # as the Hub has it: no codec.json
    sizes = {"d_model": 16, "encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    rest = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "vocab_size": 20}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    WhisperModel(WhisperConfig(**sizes, **rest, **special)).save_pretrained(folder / "whisper")
    WhisperFeatureExtractor().save_pretrained(folder / "whisper")
    return folder / "llm", folder / "whisper"


@pytest.mark.slow
def test_all_arms_run_and_the_table_tells_what_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "STEPS", 1)
    monkeypatch.setenv("ZIPPER_CACHE", str(tmp_path / "cache"))
    llm, whisper = stand_ins(tmp_path)
    small = "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 4, num_attention_heads: 2}"
    experiment = read_experiment(
        FILE,
        [
            *(f"data={workshop() / 'data'}", f"towers.text.source={llm}", f"judge={workshop() / 'judge'}"),
            f"towers.speech.pretrain.codec.source={whisper}",
            "towers.speech.pretrain.codec.options={layer: 4, rate: 25, window: 3, units: 8, refine_steps: 2}",
            f"towers.speech.pretrain.backbone={small}",
            *("towers.speech.pretrain.training.steps=1", "training.steps=3", "training.batch_size=4"),
            *("generation.text.max_new_tokens=4", "generation.speech.max_new_tokens=8", "training.evaluate_every=null"),
        ],
    )
    for arm in experiment.arms.values():  # as many words, less work
        arm.before = [*arm.before, "training.steps=1"] if arm.before else []
        arm.trials = dict(list(arm.trials.items())[-1:])
    text = f"codec: {{kind: text, options: {{vocab_size: 40}}}}, backbone: {small}, training: {{steps: 1}}"
    experiment.arms["zipper-small-text"].set[1] = f"towers.text.pretrain={{{text}}}"
    experiment.trial_set = ["training.steps=1"]
    run = {"results": tmp_path / "real-llm", "work": tmp_path / "work", "console": Console(quiet=True)}
    records = {r["run"]["arm"]: r for r in run_experiment(experiment, only="*--100-pairs--seed1", **run)}
    assert records.keys() == experiment.arms.keys()
    for arm in ("zipper", "single-decoder", "single-decoder-lora"):
        assert records[arm]["forgetting"]["questions"] == 200
        assert records[arm]["forgetting"]["before"] == records["zipper"]["forgetting"]["before"], "one source"
    assert records["zipper"]["forgetting"]["same_answers"] == 200
    assert records["zipper"]["frozen_unchanged"] == {"text": True}
    assert records["single-decoder"]["forgetting"]["same_answers"] < 200
    assert "tokenizer lacks" in records["zipper-small-text"]["forgetting"]["not_measured"], "its letters are few here"
    for record in records.values():
        assert record["scores"]["asr"]["normaliser"] == "whisper-english"
        assert {"wer", "oracle_wer"} <= record["scores"]["tts"]["second_judge"].keys()
    write_report([tmp_path / "real-llm"], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "what is learned, and what is forgotten" in page
    assert len([line for line in page.splitlines() if line.startswith("| 100-pairs | single-decoder-lora |")]) >= 1
