"""A checkpoint's config may come from anywhere: what it claims is held against the weights before memory is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_backbone, tiny_model
from tiny_recipes import workshop

from zipper_lm import TowerSpec, ZipperModel
from zipper_lm.codecs.codec import load_codec
from zipper_lm.models.baseline.expand import expand
from zipper_lm.models.baseline.single_decoder import SingleDecoder

HUGE = 10**12
Change = Callable[[dict[str, Any]], Any]


def changed(folder: Path, change: Change) -> Path:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    return folder


CHANGED = r"config\.json was changed since these weights were saved"
"""A tower that was trained in full is read with its weights, so this is seen before a field that only towers show."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["towers"]["text"]["backbone"].update(vocab_size=HUGE), "tower 'text': the config asks for"),
        (lambda c: c["towers"]["text"]["backbone"].update(intermediate_size=HUGE), "tower 'text': the config asks for"),
        (lambda c: c["towers"]["text"]["backbone"].update(vocab_size=10**19), "sizes that no weights can have"),
        (lambda c: c["towers"]["text"]["backbone"].update(num_hidden_layers=10**6), "asks for more than .* tensors"),
        (lambda c: c["zips"][0].update(heads=HUGE), "zip text<-speech: the config asks for"),
        (lambda c: c["zips"][0].update(layers=list(range(10**5))), "zip text<-speech: the config asks for"),
        (lambda c: c.update(groups=[{"text": "residual", "speech": "residual"}] * 10**5), "100000 input projections"),
    ],
)  # fmt: skip
def test_sizes_that_are_not_there_are_refused(change: Change, message: str, tmp_path: Path) -> None:
    """A vocabulary of 10^12 was made, in random numbers, and compared with the weights only then."""
    tiny_model(train={"text": "full"}).save_pretrained(tmp_path, card=False)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {message}|model\.safetensors: .*{message}"):
        ZipperModel.from_pretrained(changed(tmp_path, change))


@pytest.mark.parametrize("rank", [HUGE, 10**20])
def test_adapters_that_are_not_there_are_refused(rank: int, tmp_path: Path) -> None:
    spec = {"r": 2, "target_modules": ["q_proj"]}
    sources = {"text": tmp_path / "text", "speech": tmp_path / "speech"}
    for name, kind in (("text", "llama"), ("speech", "gpt2")):
        tiny_backbone(kind, 31, 2).save_pretrained(sources[name])
    tower = TowerSpec(source=str(sources["text"]), train="lora", lora=spec)
    ZipperModel.fuse({"text": tower, "speech": sources["speech"]}).save_pretrained(tmp_path / "model", card=False)
    ZipperModel.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"tower 'text': the config asks for|tower.lora {'r': 1000"):
        ZipperModel.from_pretrained(changed(tmp_path / "model", lambda c: c["towers"]["text"]["lora"].update(r=rank)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(towers=[1, 2]), "towers must be a mapping"),
        (lambda c: c["towers"].update(text="llama"), "tower 'text' must be a mapping"),
        (lambda c: c["towers"].update({"../../outside": c["towers"]["text"]}), "is no tower's name"),
        (lambda c: c["towers"]["text"].update(bos_token_id="a"), "tower 'text': bos_token_id cannot be str 'a'"),
        (lambda c: c["towers"]["text"].update(lora=[1]), "tower 'text': lora cannot be list"),
        (lambda c: c["towers"]["text"].update(backbone={"model_type": ["llama"]}), "unknown model_type"),
        (lambda c: c["towers"]["text"]["backbone"].update(hidden_size="a"), "its backbone's config cannot be used"),
        (lambda c: c["zips"].append(3), "a zip must be a mapping"),
        (lambda c: c["zips"][0].update(layers="abc"), "zip: layers cannot be str"),
        (lambda c: c["zips"][0].update(layers=[0, 1, 99]), CHANGED),
        (lambda c: c["zips"][0].update(stretch=float("nan")), "zip.stretch must be above 0"),
        (lambda c: c["zips"][0].update(heads=True), "zip: heads cannot be bool"),
    ],
)
def test_a_config_of_other_types_is_refused_by_field(change: Change, message: str, tmp_path: Path) -> None:
    """They ended in an AttributeError, a TypeError or a KeyError, or a folder was made of a tower's name on saving."""
    tiny_model(train={"text": "full"}).save_pretrained(tmp_path, card=False)
    with pytest.raises(ValueError, match=message):
        ZipperModel.from_pretrained(changed(tmp_path, change))


def test_a_deep_config_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, card=False)
    (tmp_path / "config.json").write_text('{"model_type": "zipper", "towers": ' + "[" * 2000 + "]" * 2000 + "}")
    with pytest.raises(ValueError, match=r"config\.json: malformed JSON: nested"):
        ZipperModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["decoder"]["backbone"].update(vocab_size=HUGE), "the single decoder: the config asks for"),
        (lambda c: c["decoder"]["backbone"].update(num_hidden_layers=10**6), "asks for more than"),
        (lambda c: c["decoder"].update(source=3), "the decoder: source cannot be int"),
        (lambda c: c["modalities"][0].update(size="a"), CHANGED),
        (lambda c: c["modalities"][0].pop("size"), CHANGED),
    ],
)
def test_a_single_decoder_is_held_against_its_weights(change: Change, message: str, tmp_path: Path) -> None:
    codecs = {name: load_codec(workshop() / name) for name in ("text", "speech")}
    expand("text", workshop() / "text", codecs).save_pretrained(tmp_path, card=False)
    SingleDecoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        SingleDecoder.from_pretrained(changed(tmp_path, change))
