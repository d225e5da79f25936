"""A tower that leaves a model is a plain checkpoint: no class of ours, the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_backbone
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from zipper_lm import TowerSpec, ZipperModel
from zipper_lm.codecs.text import TextCodec
from zipper_lm.models.baseline.expand import expand

IDS = torch.tensor([[0, 5, 7, 9, 3], [0, 4, 4, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@torch.no_grad()
def train_a_little(backbone: PreTrainedModel) -> None:
    """Something that is no longer the source."""
    torch.manual_seed(1)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter += torch.randn_like(parameter) * 0.1


def of_tokens(alone: PreTrainedModel) -> torch.Tensor:
    """Logits at what is no padding, where a tower counts positions from the mask."""
    return alone(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]


def unimodal(model: ZipperModel) -> torch.Tensor:
    return model.tower("text")(IDS, MASK)[0][MASK.bool()]


def letters() -> TextCodec:
    return TextCodec.train(["one two three", "three one two"], vocab_size=31)


def source(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    tiny_backbone(kind, 31).to(dtype).save_pretrained(folder / "text")
    letters().save_pretrained(folder / "text")
    return folder / "text"


@pytest.mark.parametrize("train", ["frozen", "full"])
@pytest.mark.parametrize("kind", ["llama", "gpt2-tied", "qwen3"])
def test_logits_are_the_towers_own_bit_for_bit(kind: str, train: str, tmp_path: Path) -> None:
    model = ZipperModel.fuse(
        {"text": source(tmp_path, kind), "speech": tiny_backbone("gpt2", 53)}, train={"text": train}
    )
    train_a_little(model.tower("text").backbone)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.export_tower("text", tmp_path / "out")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(alone) is type(model.tower("text").backbone)
    assert torch.equal(of_tokens(alone), unimodal(model))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("one two") == letters().tokenizer.encode("one two")
    assert not any("zip" in file.name for file in (tmp_path / "out").iterdir())
    again = ZipperModel.fuse({"text": tmp_path / "out", "speech": tiny_backbone("gpt2", 53)})  # a tower it still is
    assert again.processor is not None
    assert again.processor.codecs["text"].encode(["one two"]) == letters().encode(["one two"])


LORAS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "all linear layers": ("llama", None),
    "tied": ("gpt2-tied", {"target_modules": ["c_attn"]}),
    "on a tied head": ("gpt2-tied", {"target_modules": ["c_attn", "lm_head"]}),
    "on a tied embedding": ("gpt2-tied", {"target_modules": ["wte"]}),
    "tokens of tied ends": ("gpt2-tied", {"target_modules": ["c_attn"], "trainable_token_indices": [3, 4]}),
    "dora": ("llama", {"use_dora": True}),
    "a head of its own": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("case", LORAS)
def test_adapters_are_merged(case: str, tmp_path: Path) -> None:
    kind, lora = LORAS[case]
    spec = TowerSpec(source=str(source(tmp_path, kind)), train="lora", lora=lora)
    model = ZipperModel.fuse({"text": spec, "speech": tiny_backbone("gpt2", 53)})
    base = unimodal(model)
    train_a_little(model.tower("text").backbone)
    logits = unimodal(model)
    assert (logits - base).abs().max() > 0.01
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.export_tower("text", tmp_path / "out")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(unimodal(model), logits)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("lora" in name for name in alone.state_dict())
    torch.testing.assert_close(of_tokens(alone), logits, rtol=1e-4, atol=1e-4)


def test_adapters_of_a_coarse_tower_are_merged_in_its_dtype(tmp_path: Path) -> None:
    spec = TowerSpec(source=str(source(tmp_path, dtype=torch.bfloat16)), train="lora")
    model = ZipperModel.fuse({"text": spec, "speech": tiny_backbone("gpt2", 53)})
    train_a_little(model.tower("text").backbone)
    logits = unimodal(model)
    model.export_tower("text", tmp_path / "out")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert alone.dtype == torch.bfloat16
    apart = (of_tokens(alone) - logits).abs().max()
    assert apart < 0.05 * logits.abs().max()


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_single_decoder(train: str, tmp_path: Path) -> None:
    single = expand("text", source(tmp_path), {"text": letters(), "speech": letters()}, train=train)
    train_a_little(single.backbone)
    single.export_tower("text", tmp_path / "out")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = IDS + 31  # of the modality that was added
    expected = single.backbone(input_ids=ids).logits
    assert alone.config.vocab_size == expected.shape[-1] > 31
    torch.testing.assert_close(alone(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert train == "lora" or torch.equal(alone(input_ids=ids).logits, expected)
    with pytest.raises(ValueError, match=r"unknown tower 'speech'; this model has \['text'\]"):
        single.export_tower("speech", tmp_path / "other")


def test_a_part_of_a_larger_model_stands_alone(tmp_path: Path) -> None:
    """Such as a language model that was published under `lm.` inside a speech model."""
    from safetensors.torch import load_file, save_file

    folder = source(tmp_path)
    (folder / "codec.json").unlink()
    save_file({f"lm.{k}": v for k, v in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "whole", "base_config": config}))
    spec = TowerSpec(source=str(folder), prefix="lm.", config_key="base_config", architecture="LlamaForCausalLM")
    model = ZipperModel.fuse({"text": spec, "speech": tiny_backbone("gpt2", 53)})
    model.export_tower("text", tmp_path / "out")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(of_tokens(alone), unimodal(model))


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ZipperModel.fuse({"text": source(tmp_path), "speech": tiny_backbone("gpt2", 53)})
    with pytest.raises(ValueError, match="unknown tower 'smell'"):
        model.export_tower("smell", tmp_path / "out")
    for change, message in (
        ({"trust_remote_code": True}, "'text' has code of its own"),
        ({"quantization": {"quant_method": "torchao"}}, "'text' is quantized"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(model.config.towers, "text", model.config.towers["text"] | change)
            with pytest.raises(ValueError, match=message):
                model.export_tower("text", tmp_path / "out")
    with pytest.raises(ValueError, match="would replace tower 'text'"):
        model.export_tower("speech", tmp_path / "text", overwrite=True)
    with pytest.raises(ValueError, match="would replace tower 'text'"):
        model.export_tower("speech", tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ZipperModel.fuse({"text": source(tmp_path), "speech": tiny_backbone("gpt2", 53)})
    model.export_tower("text", tmp_path / "out")
    with pytest.raises(ValueError, match="exists"):
        model.export_tower("text", tmp_path / "out")
    (tmp_path / "out" / "more.txt").write_text("")
    model.export_tower("text", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "more.txt").exists()

    def fail(self: TextCodec, path: Path) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(TextCodec, "save_pretrained", fail)
    with pytest.raises(OSError, match="full"):
        model.export_tower("text", tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_merged_adapters_that_would_say_something_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraModel

    spec = TowerSpec(source=str(source(tmp_path)), train="lora")
    model = ZipperModel.fuse({"text": spec, "speech": tiny_backbone("gpt2", 53)})
    train_a_little(model.tower("text").backbone)
    unload = LoraModel.unload
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: unload(self))
    with pytest.raises(ValueError, match="'text': its adapters cannot be merged: logits would differ by"):
        model.export_tower("text", tmp_path / "out")
    assert not (tmp_path / "out").exists()
