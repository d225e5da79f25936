"""What is no tower is refused by its type, with the way on; what is one is found by trying."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import tiny_backbone, tiny_model
from tiny_recipes import workshop
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from zipper_lm import ZipperModel
from zipper_lm.fusion.backbones import load_backbone
from zipper_lm.fusion.tower import Tower
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.models.baseline.expand import expand
from zipper_lm.models.combine import combine

BERT = BertConfig(
    vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
T5 = T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)


def llama() -> PreTrainedModel:
    return tiny_backbone("llama", 31, 2)


def with_adapter() -> PreTrainedModel:
    """As `add_adapter` leaves it, for which older versions of PEFT are too old."""
    backbone = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), llama())
    backbone._hf_peft_config_loaded = True
    return backbone


class Wrapped(nn.Module):
    """Somebody's own module around a decoder, as a pipeline holds one."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()


class FSDPLlama(type(llama())):  # type: ignore[misc]
    """fully_shard gives a model a class of such a name."""


def compiled_in_place() -> PreTrainedModel:
    backbone = llama()
    backbone.compile()
    return backbone


NO_TOWERS: dict[str, tuple[Callable[[], Any], str]] = {
    "PeftModel": (
        lambda: get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])),
        r"PeftModel .*merge_and_unload\(\) first",
    ),
    "adapter": (with_adapter, "LlamaForCausalLM .*it has adapters"),
    "compiled": (lambda: torch.compile(llama()), "OptimizedModule .*give the model that was compiled"),
    "compiled-in-place": (compiled_in_place, "LlamaForCausalLM .*was compiled in place"),
    "DataParallel": (lambda: nn.DataParallel(llama()), r"DataParallel .*\(\.module\)"),
    "FSDP": (lambda: FSDPLlama(llama().config), r"FSDPLlama .*\(\.module\)"),
    "state-dict": (lambda: llama().state_dict(), "OrderedDict .*tensors alone do not say"),
    "pipeline": (Wrapped, r"Wrapped .*the model in it \(\.model\)"),
    "module": (lambda: nn.Linear(2, 2), "Linear .*must be a decoder of transformers"),
    "None": (lambda: None, "NoneType .*must be a decoder of transformers"),
    "headless": (lambda: LlamaModel(llama().config), "LlamaModel .*has no language-model head"),
    "encoder": (lambda: BertModel(BERT), "BertModel .*has no language-model head"),
    "encoder-decoder": (lambda: T5ForConditionalGeneration(T5), "T5ForCond.*an encoder with a decoder"),
    "fused": (tiny_model, "ZipperModel .*it is a fused model"),
}


@pytest.mark.parametrize("kind", NO_TOWERS)
def test_what_is_no_tower_is_named_with_the_way_on(kind: str) -> None:
    """They ended in an AttributeError, in "no such folder", or in a tower whose weights had other names."""
    make, message = NO_TOWERS[kind]
    given = make()
    speech = tiny_backbone("gpt2", 53, 2)
    for use in (
        lambda: ZipperModel.fuse({"text": given, "speech": speech}),
        lambda: Tower(given, "text"),
        lambda: expand("text", given, {"text": None, "speech": None}),  # type: ignore[dict-item]
    ):
        with pytest.raises(ValueError, match=f"a {message}"):
            use()


def test_what_is_no_tower_stands_in_for_none(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, card=False)
    with pytest.raises(ValueError, match=r"towers= for 'text': a PeftModel.* is no tower: .*merge_and_unload"):
        ZipperModel.from_pretrained(tmp_path, towers={"text": NO_TOWERS["PeftModel"][0]()})
    with pytest.raises(ValueError, match="model 2 is a LlamaForCausalLM"):
        combine([tiny_model(), llama()])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BertForMaskedLM(BERT), "in BertForMaskedLM a token sees later ones"),
        (lambda: BertLMHeadModel(BERT), "in BertLMHeadModel a token sees later ones"),
        (lambda: LlamaForSequenceClassification(llama().config), "it has another head than a language model's"),
    ],
)
def test_what_is_no_decoder_is_found_by_trying(make: Callable[[], Any], message: str) -> None:
    """An encoder with a language-model head was fused, and its tokens saw those that were still to be written."""
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=f"tower 'text': .*{message}"):
        ZipperModel.fuse({"text": make(), "speech": tiny_backbone("gpt2", 53, 2)})


def test_a_decoder_of_an_encoders_family_is_a_tower() -> None:
    torch.manual_seed(0)
    causal = BertLMHeadModel(BertConfig(**BERT.to_dict() | {"is_decoder": True}))
    ZipperModel.fuse({"text": causal, "speech": tiny_backbone("gpt2", 53, 2)})


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_of_adapters_is_no_tower(whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers fetched the base that the adapters' config names, from wherever that is, and the adapters got lost
    or into the tower's weights."""
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "somebody/base"}))
    if whole:
        llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds adapters \(PEFT\) for 'somebody/base', which are no tower"):
        ZipperModel.fuse({"text": tmp_path, "speech": tiny_backbone("gpt2", 53, 2)})


def test_a_folder_of_another_kind_is_no_tower(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "fused", card=False)
    with pytest.raises(ValueError, match="holds a fused model, no decoder"):
        load_backbone(TowerSpec(source=str(tmp_path / "fused")))
    for name, model, message in (
        ("t5", T5ForConditionalGeneration(T5), "T5ForConditionalGeneration is no tower: it is an encoder"),
        ("bert", BertForMaskedLM(BERT), "a token sees later ones"),
    ):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            ZipperModel.fuse({"text": tmp_path / name, "speech": workshop() / "speech"})
    with pytest.raises(ValueError, match="no such folder here"):
        ZipperModel.fuse({"text": "no-repo-of-that-name", "speech": workshop() / "speech"})


def test_an_architecture_is_a_model(tmp_path: Path) -> None:
    """What else transformers has by that name was called."""
    T5ForConditionalGeneration(T5).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["pipeline"]}))
    with pytest.raises(ValueError, match="no causal-LM class"):
        load_backbone(TowerSpec(source=str(tmp_path), architecture="pipeline"))
