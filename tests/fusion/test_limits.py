"""A tower that has a vector for each position ends with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import doc, tiny_backbone, tiny_model
from tiny_recipes import plain_recipe, workshop
from tower_families import tiny_model as tiny_family
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
    RobertaConfig,
    WhisperConfig,
)

from zipper_lm import ZipperModel
from zipper_lm.codecs.speech import SpeechCodec
from zipper_lm.fusion.limits import check_length, position_limit
from zipper_lm.generation.generate import stream
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.reader import build
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.models.baseline.expand import expand
from zipper_lm.models.baseline.single_decoder import SingleDecoder

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40, "pad_token_id": 1}

WHISPER = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "vocab_size": 40, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=20), 20),
        (OPTConfig(**SMALL, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=20), 20),
        (BioGptConfig(**SMALL, intermediate_size=16, max_position_embeddings=20), 20),
        (RobertaConfig(**SMALL, intermediate_size=16, is_decoder=True, max_position_embeddings=22), 20),
        (GPTJConfig(n_embd=16, n_layer=1, n_head=2, vocab_size=40, rotary_dim=4, n_positions=20), 20),
        (MptConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=40, max_seq_len=20), 20),
        (WhisperConfig(**WHISPER, max_target_positions=20), 20),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_the_limit_is_where_the_family_breaks(config: PreTrainedConfig, limit: int) -> None:
    """MPT and Whisper call their limit by other names than most, and so seemed to have none."""
    backbone = AutoModelForCausalLM.from_config(config).eval()
    assert position_limit(backbone) == limit
    ids = torch.full((1, limit + 1), 5)
    with torch.no_grad():
        backbone(input_ids=ids[:, :limit], attention_mask=torch.ones_like(ids[:, :limit]))
        with pytest.raises((IndexError, RuntimeError)):
            backbone(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_rotary_towers_have_none() -> None:
    for kind in ("llama", "qwen3", "mamba"):
        assert position_limit(tiny_backbone(kind, 31)) is None


def test_a_tower_that_makes_more_positions_has_none() -> None:
    """MusicGen's table of sines grows with its stream; it was taken for an end."""
    backbone = tiny_family("musicgen")
    assert position_limit(backbone) is None
    with torch.no_grad():
        backbone(input_ids=torch.full((1, 70), 5))  # its config says 64


def short(positions: int) -> ZipperModel:
    """Its speech tower has so many positions, and never ends by itself."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=24, n_layer=4, n_head=2, vocab_size=53, n_positions=positions, initializer_range=0.3)
    speech = GPT2LMHeadModel(config).eval()
    speech.config.bos_token_id, speech.config.eos_token_id, speech.config.pad_token_id = 0, 1, 2
    with torch.no_grad():
        speech.transformer.wte.weight[1] = 0
    return ZipperModel.fuse({"text": tiny_backbone("llama", 31), "speech": speech})


@pytest.mark.parametrize("settings", [{}, {"max_length": 100}, {"num_beams": 2}, {"use_cache": False}])
def test_what_is_written_ends_with_the_positions(settings: dict[str, Any]) -> None:
    """With the default of 256 new tokens a bare IndexError took all that had been written along."""
    model = short(24)
    given = [doc(("text", [5, 6, 7])), doc(("speech", [9] * 8), ("text", [5]))]
    written = model.generate(given, ["speech"], settings={"speech": settings})
    assert [len(d[-1].ids or []) for d in written] == [24 - 11 - 1] * 2, "the longest row has 8 units, BOS, EOS, BOS"
    more = model.generate(written, ["text"], settings={"text": {"max_new_tokens": 2}})  # what was written can be read
    assert [d[-1].modality for d in more] == ["text", "text"]


def test_no_room_is_said_by_name() -> None:
    model = short(24)
    with pytest.raises(ValueError, match="'speech': its backbone has 24 positions, and 23 are read: no room"):
        model.generate([doc(("speech", [9] * 20), ("text", [5]))], ["speech"])
    with pytest.raises(ValueError, match="'speech': a stream of 32 tokens, but its backbone has 24 positions"):
        model.generate([doc(("speech", [9] * 30))], ["text"])


def test_a_stream_ends_there_too() -> None:
    tokens = list(stream(short(24), doc(("text", [5, 6, 7])), ["speech"]))
    assert len(tokens) == 22


def test_a_single_decoder_ends_there_too() -> None:
    class Ids:
        kind = "units"

        def __init__(self, size: int) -> None:
            self.vocab_size, self.bos_id, self.eos_id, self.pad_id = size, 0, 1, 2

    torch.manual_seed(0)
    config = GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=31, n_positions=16)
    single: SingleDecoder = expand("text", GPT2LMHeadModel(config), {"text": Ids(31), "speech": Ids(20)})  # type: ignore[dict-item]
    settings = {"speech": {"min_new_tokens": 1}}
    (written,) = single.generate([doc(("text", [5, 6, 7]))], ["speech"], settings=settings, decode=False)
    assert 1 <= len(written[-1].ids or []) <= 16 - 6 - 1


def with_short_speech(tmp_path: Path, positions: int, output: str, **changes: Any) -> FuseRecipe:
    """A recipe whose speech tower has so many positions."""
    here = workshop()
    codec = SpeechCodec.from_pretrained(here / "speech")
    torch.manual_seed(0)
    special = {"bos_token_id": codec.bos_id, "eos_token_id": codec.eos_id, "pad_token_id": codec.pad_id}
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": codec.vocab_size, "n_positions": positions}
    tower = GPT2LMHeadModel(GPT2Config(**size, **special, initializer_range=0.5))
    tower.transformer.wte.weight.data[codec.eos_id] = 0
    tower.save_pretrained(tmp_path / "speech")
    codec.save_pretrained(tmp_path / "speech")
    training = {"steps": 2, "learning_rate": 1e-4, "tower_learning_rate": 1e-5}
    recipe = plain_recipe(tmp_path / output, training=training, **changes)
    recipe["towers"]["speech"]["source"] = str(tmp_path / "speech")
    return build(FuseRecipe, recipe)


def test_scoring_past_the_positions_does_not_lose_the_run(tmp_path: Path) -> None:
    """Rows fitted, and what was generated to score them did not: after the last step the run was lost."""
    record = fuse(with_short_speech(tmp_path, 64, "m", generation={}))
    assert any("eval_wer" in entry for entry in record["history"])


def test_a_task_that_names_a_tower_twice_needs_room_for_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows were compared with the limit as if each came once: training began, and broke at the first long row."""
    monkeypatch.setattr("zipper_lm.jobs.fuse.train_with_bar", lambda *_: pytest.fail("training began"))
    tasks = {"speech->text->speech": 1.0}
    with pytest.raises(ValueError, match="tower 'speech': the longest stream has 28 tokens, the backbone 16 pos"):
        fuse(with_short_speech(tmp_path, 16, "m", tasks=tasks))


def test_rows_are_held_against_what_a_family_really_has() -> None:
    """RoBERTa's kin begin after the padding id: of 22 positions 20 serve, and rows of 21 broke in training."""
    config = RobertaConfig(**SMALL, intermediate_size=16, is_decoder=True, max_position_embeddings=22)
    backbone = AutoModelForCausalLM.from_config(config)
    check_length(backbone, [20], "speech")
    with pytest.raises(ValueError, match="the longest stream has 21 tokens, the backbone 20 positions"):
        check_length(backbone, [21], "speech")


def test_a_length_that_was_asked_for_is_kept() -> None:
    """``max_length: 20`` was taken for a default that transformers once had, and meant 256 new tokens."""
    model = tiny_model()
    settings = {"speech": {"max_length": 20, "min_new_tokens": 17}}
    (written,) = model.generate([doc(("text", [5, 6, 7]))], ["speech"], settings=settings)
    assert 17 <= len(written[-1].ids or []) <= 19
