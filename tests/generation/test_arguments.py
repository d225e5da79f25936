"""Short forms of what a call is given, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import doc, ids_of, limits, tiny_backbone, tiny_model
from transformers import GenerationConfig

from zipper_lm import Document, Segment
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.processor import ZipperProcessor
from zipper_lm.models.baseline.expand import expand


def zipped() -> Any:
    model = tiny_model(gate=0.5)
    model.processor = ZipperProcessor({"text": _codec()}, model.specials)
    return model


def single() -> Any:
    torch.manual_seed(0)
    return expand("text", tiny_backbone("llama", 31), {"text": _codec(), "speech": _codec()})


def _codec() -> TextCodec:
    return TextCodec.train(["three one four one five"] * 4, vocab_size=31)


BOTH = pytest.mark.parametrize("make", [zipped, single])
THREE = Document([("text", "three")])


@BOTH
@pytest.mark.parametrize("given", ["three", ("text", "three"), Segment("text", "three"), THREE], ids=repr)
def test_one_in_one_out_and_a_list_for_a_list(make: Any, given: Any) -> None:
    model = make()
    (expected,) = model.generate([THREE], ["speech"], settings=limits(model, 4))
    alone = model.generate(given, "speech", settings=limits(model, 4))
    assert isinstance(alone, Document)
    listed = model.generate([given, given], "speech", settings=limits(model, 4))
    assert ids_of([alone]) == ids_of(listed[:1]) == ids_of(listed[1:]) == ids_of([expected])


@BOTH
def test_a_list_in_a_list_is_a_document(make: Any) -> None:
    model = make()
    segments = [("text", "three"), Segment("speech", ids=[5, 6])]
    written = model.generate([segments], ["text"], settings=limits(model, 4))
    assert ids_of(written) == ids_of(model.generate([Document(segments)], ["text"], settings=limits(model, 4)))


@BOTH
def test_a_stream_takes_them_too(make: Any) -> None:
    model = make()
    expected = model.generate(THREE, "speech", max_new_tokens=5)
    assert [t.id for t in model.stream("three", "speech", max_new_tokens=5)] == expected[-1].ids


@BOTH
def test_flat_settings_are_for_every_modality(make: Any) -> None:
    model = make()
    flat = model.generate(THREE, ["speech", "text"], max_new_tokens=3, min_new_tokens=3)
    assert [len(s.ids) for s in flat.segments[1:]] == [3, 3]
    named = {"text": {"min_new_tokens": 5, "max_new_tokens": 5}}
    mixed = model.generate(THREE, ["speech", "text"], settings=named, max_new_tokens=3, min_new_tokens=3)
    assert [len(s.ids) for s in mixed.segments[1:]] == [3, 5]
    config = GenerationConfig(max_new_tokens=3, min_new_tokens=3)
    assert ids_of([model.generate(THREE, ["speech", "text"], settings=config)]) == ids_of([flat])
    with pytest.raises(ValueError, match=r"'text' are a GenerationConfig: \['max_new_tokens'\] belong there"):
        model.generate(THREE, "text", settings={"text": config}, max_new_tokens=3)


@BOTH
def test_settings_that_are_kept_beside_the_model(make: Any) -> None:
    model = make()
    model.generation_settings = {"speech": {"max_new_tokens": 4, "min_new_tokens": 4}}
    assert len(model.generate(THREE, "speech")[-1].ids) == 4
    assert len(model.generate(THREE, "speech", max_new_tokens=6, min_new_tokens=6)[-1].ids) == 6
    assert len(model.generate(THREE, "speech", settings={"speech": {"max_new_tokens": 2}})[-1].ids) <= 2
    assert list(model.stream(THREE, "speech")) != []


@BOTH
def test_kept_settings_come_and_go_with_the_model(make: Any, tmp_path: Path) -> None:
    model = make()
    owner, model.generation_settings = type(model), {"speech": {"max_new_tokens": 4, "min_new_tokens": 4}}
    model.save_pretrained(tmp_path / "a", card=False)
    again = owner.from_pretrained(tmp_path / "a")
    assert len(again.generate(THREE, "speech")[-1].ids) == 4
    (tmp_path / "a" / "generation.json").write_text('{"speech": 5}')
    with pytest.raises(ValueError, match=r"generation\.json: settings of 'speech' must be a mapping, got 5"):
        owner.from_pretrained(tmp_path / "a")
    model.generation_settings = {}
    model.save_pretrained(tmp_path / "b", card=False)
    assert not (tmp_path / "b" / "generation.json").exists()


@BOTH
@pytest.mark.parametrize(
    ("documents", "schedule", "how", "message"),
    [
        (None, "text", {}, "documents must be .* got NoneType"),
        (5, "text", {}, "documents must be .* got int: 5"),
        ({"text": "three"}, "text", {}, "documents must be .* got dict"),
        (b"three", "text", {}, "documents must be .* got bytes"),
        ([5], "text", {}, "a document is a list of segments, got 5"),
        ([None], "text", {}, "a document is a list of segments, got None"),
        ([[5]], "text", {}, r"a segment is a Segment or \(modality, value\), got 5"),
        ([("text", "a", "b")], "text", {}, r"a segment is a Segment or \(modality, value\), got 'text'"),
        (("smell", "rose"), "text", {}, "unknown modality 'smell'"),
        (THREE, None, {}, "schedule must be"),
        (THREE, 5, {}, "schedule must be"),
        (THREE, "", {}, "schedule names ''"),
        (THREE, [5], {}, r"schedule: a segment is a Segment or \(modality, value\), got 5"),
        (THREE, [("text",)], {}, r"schedule: a segment is .* got \('text',\)"),
        (THREE, ["text"], {"settings": 5}, "settings must be given by modality, got int"),
        (THREE, ["text"], {"settings": {"text": 5}}, "settings for 'text' must be a mapping"),
        (THREE, ["text"], {"settings": {5: {}}}, r"settings name \['5'\]"),
        (THREE, ["text"], {"max_new_token": 3}, r"unknown \['max_new_token'\]"),
        (THREE, ["text"], {"eos_token_id": 3}, "eos_token_id=3 is not followed"),
        (THREE, ["text"], {"return_dict_in_generate": True}, "return_dict_in_generate=True is not followed"),
    ],
    ids=repr,
)
def test_what_is_refused(make: Any, documents: Any, schedule: Any, how: dict[str, Any], message: str) -> None:
    """They ended in an AttributeError or a TypeError deep inside."""
    with pytest.raises(ValueError, match=message):
        make().generate(documents, schedule, **how)


@pytest.mark.parametrize("most", [-1, 1.5, "many"])
def test_how_many_segments(most: Any) -> None:
    with pytest.raises(ValueError, match="max_segments must be a whole number from 0 on"):
        tiny_model().generate([doc(("text", [5]))], "auto", max_segments=most)


@pytest.mark.parametrize("ids", [5, ["a"], [None]])
def test_ids_that_are_no_numbers(ids: Any) -> None:
    with pytest.raises(ValueError, match="segment of modality 'text': ids must be whole numbers"):
        Segment("text", ids=ids)


def test_a_string_is_a_text() -> None:
    model = tiny_model(kinds={}, towers=2)
    model.processor = None
    with pytest.raises(ValueError, match="text has a raw value, but the model has no processor"):
        model.generate("three", "speech")
