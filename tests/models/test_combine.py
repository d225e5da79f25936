"""Zips trained apart over the same frozen tower, used together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import doc, ids_of, naive_greedy, open_gates, tiny_backbone
from transformers import PreTrainedModel
from typer.testing import CliRunner

from zipper_lm import Document, Segment, TowerSpec, ZipperModel, ZipSpec
from zipper_lm.cli import app
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.collation import collate
from zipper_lm.evaluation.preservation import verify
from zipper_lm.models.combine import combine


def pair(text: PreTrainedModel, other: str, kind: str, seed: int, **kwargs: object) -> ZipperModel:
    """Text, frozen, with another tower, trained; opened so that everything matters."""
    torch.manual_seed(seed)
    model = ZipperModel.fuse(
        {"text": text, other: tiny_backbone(kind, 53, 3, seed)},
        zips=ZipSpec(layers=2),
        train={other: "full"},
        **kwargs,  # type: ignore[arg-type]
    )
    open_gates(model, 0.7)
    return model.eval()


@pytest.fixture
def models() -> tuple[ZipperModel, ZipperModel]:
    text = tiny_backbone("llama", 31, 4)
    again = tiny_backbone("llama", 31, 4)
    return pair(text, "speech", "gpt2", 1), pair(again, "image", "qwen3", 2)


SPOKEN = [doc(("speech", [5, 6, 7]), ("text", [8, 9])), doc(("text", [4]), ("speech", [11, 12]), ("text", [6]))]
SHORT = {"text": {"max_new_tokens": 6}}
SEEN = [doc(("image", [5, 6, 7, 9]), ("text", [8])), doc(("text", [4, 7]), ("image", [11]))]


@torch.no_grad()
def test_each_pair_computes_what_it_computed(models: tuple[ZipperModel, ZipperModel]) -> None:
    """The contract of `combine`: bit for bit, on documents of one model's own towers, alone or beside others."""
    before = [m(collate(d, m.specials)).logits for m, d in zip(models, (SPOKEN, SEEN))]
    written = [
        m.generate(d, ["text"], settings={"text": {"max_new_tokens": 6}}) for m, d in zip(models, (SPOKEN, SEEN))
    ]
    both = combine(models)
    assert both.names == ["image", "speech", "text"]
    assert set(both.layer_pairs) == {
        *(("text", "speech"), ("speech", "text"), ("text", "image"), ("image", "text")),
    }
    for documents, logits, texts in zip((SPOKEN, SEEN), before, written):
        after = both(collate(documents, both.specials)).logits
        assert set(after) == set(logits)
        assert all(torch.equal(after[n], logits[n]) for n in logits)
        again = both.generate(documents, ["text"], settings=SHORT)
        assert ids_of(again) == ids_of(texts)
    mixed = both(collate([*SPOKEN, *SEEN], both.specials)).logits
    torch.testing.assert_close(mixed["image"][2:, : before[1]["image"].shape[1]], before[1]["image"])


@torch.no_grad()
def test_a_chain_goes_through_all_three(models: tuple[ZipperModel, ZipperModel]) -> None:
    """speech -> text -> image in one document: cached and uncached agree, and what is said changes what is drawn."""
    both = combine(models)
    limit = {n: {"max_new_tokens": 5} for n in both.names}
    given = [doc(("speech", [5, 6, 7])), doc(("speech", [12]))]
    found = ids_of(both.generate(given, ["text", "image"], settings=limit))
    assert found == naive_greedy(both, given, ["text", "image"], 5)
    said = both.generate(given, ["text"], settings=limit)
    drawn = both.generate([doc(("text", d[1].ids or [])) for d in said], ["image"], settings=limit)
    in_two_calls = [[*first, second[1]] for first, second in zip(ids_of(said), ids_of(drawn))]
    assert found == in_two_calls, "each pair does in a chain what it does alone"
    with pytest.raises(ValueError, match=r"'image' reads none of \['speech'\]: there is no zip"):
        both.generate(given, ["image"], settings=limit)
    streamed = list(both.stream(given[0], ["text", "image"], settings=limit))
    assert [(t.modality, t.segment) for t in streamed] == [
        *(("text", 1) for _ in found[0][1][1]),
        *(("image", 2) for _ in found[0][2][1]),
    ]
    memory = both(collate([doc(("speech", [5]), ("text", [8]), ("image", [9, 9]))], both.specials)).logits["image"]
    other = both(collate([doc(("speech", [40]), ("text", [8]), ("image", [9, 9]))], both.specials)).logits["image"]
    assert torch.equal(memory, other), "an image reads the text as its own training did, whatever was heard"
    together = [doc(("speech", [5]), ("image", [9, 6]), ("text", [8, 4])), doc(("image", [7]), ("text", [3]))]
    joint = both(collate(together, both.specials)).logits["text"][0]
    other_speech = doc(("speech", [9]), ("image", [9, 6]), ("text", [8, 4]))
    other_image = doc(("speech", [5]), ("image", [9, 7]), ("text", [8, 4]))
    for changed in (other_speech, other_image):
        assert not torch.equal(both(collate([changed], both.specials)).logits["text"][0], joint)
    assert ids_of(both.generate(together, ["text"], settings=limit)) == naive_greedy(both, together, ["text"], 5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_come_along(models: tuple[ZipperModel, ZipperModel], tmp_path: Path, dtype: torch.dtype) -> None:
    """A new model makes new adapters in a LoRA tower: combining used to put fresh ones in place of the trained ones,
    and to forget which they are where they are cast from half precision."""
    text = tiny_backbone("llama", 31, 4)
    torch.manual_seed(0)
    tiny_backbone("llama", 53, 3, 1).to(dtype).save_pretrained(tmp_path / "speech")
    towers = {"text": text, "speech": tmp_path / "speech"}
    speech = ZipperModel.fuse(towers, zips=ZipSpec(layers=2), train={"speech": "lora"}).eval()
    open_gates(speech, 0.7)
    for name, parameter in speech.tower("speech").backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    before = speech(collate(SPOKEN, speech.specials)).logits
    both = combine([speech, models[1]])
    after = both(collate(SPOKEN, both.specials)).logits
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(before[n], g) for n, g in speech(collate(SPOKEN, speech.specials)).logits.items())
    assert both.tower("speech").adapter_names == speech.tower("speech").adapter_names
    again = combine([both, pair(text, "protein", "mistral", 3)])
    assert again.tower("speech").adapter_names == speech.tower("speech").adapter_names
    again.save_pretrained(tmp_path / "all")
    loaded = ZipperModel.from_pretrained(tmp_path / "all")(collate(SPOKEN, again.specials)).logits
    assert all(torch.equal(before[n], loaded[n]) for n in before)


def test_a_module_that_is_trained_whole_comes_along(models: tuple[ZipperModel, ZipperModel], tmp_path: Path) -> None:
    """PEFT keeps a copy that is there already, so the new model took it for a frozen part and did not save it."""
    tiny_backbone("llama", 53, 3, 1).save_pretrained(tmp_path / "speech")
    spec = TowerSpec(source=str(tmp_path / "speech"), train="lora", lora={"modules_to_save": ["lm_head"]})
    towers = {"text": tiny_backbone("llama", 31, 4), "speech": spec}
    speech = ZipperModel.fuse(towers, zips=ZipSpec(layers=2)).eval()
    with torch.no_grad():
        speech.tower("speech").backbone.lm_head.modules_to_save["default"].weight.add_(0.5)
    before = speech(collate(SPOKEN, speech.specials)).logits
    both = combine([speech, models[1]])
    assert both.tower("speech").adapter_names == speech.tower("speech").adapter_names
    both.save_pretrained(tmp_path / "both")
    loaded = ZipperModel.from_pretrained(tmp_path / "both")(collate(SPOKEN, both.specials)).logits
    assert all(torch.equal(before[n], loaded[n]) for n in before)


def test_saved_loaded_combined_again_and_verified(models: tuple[ZipperModel, ZipperModel], tmp_path: Path) -> None:
    text = models[0].tower("text").backbone
    third = pair(text, "protein", "mistral", 3)
    three = combine([combine(models), third])
    batch = collate([*SPOKEN, *SEEN, doc(("protein", [4]), ("text", [5]))], three.specials)
    with torch.no_grad():
        before = three(batch).logits
    three.save_pretrained(tmp_path / "three")
    again = ZipperModel.from_pretrained(tmp_path / "three")
    with torch.no_grad():
        after = again(batch).logits
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(r.identical for r in verify(again, tmp_path / "three") if r.name == "text")
    with pytest.raises(ValueError, match="never learned who speaks next"):
        three.generate([doc(("text", [4]))], "auto")


def test_a_combination_can_be_trained_on(models: tuple[ZipperModel, ZipperModel]) -> None:
    both = combine(models).train()
    target = Document(
        [Segment("speech", ids=[5, 6]), Segment("text", ids=[7], target=True), Segment("image", ids=[9], target=True)]
    )
    loss = both(collate([target], both.specials)).loss
    assert loss is not None
    loss.backward()
    for part in (both.zips["image"]["text"], both.input_projections["text"], both.input_projections["text@1"]):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert all(p.grad is None for p in both.tower("text").backbone.parameters())


def test_what_cannot_be_combined(models: tuple[ZipperModel, ZipperModel]) -> None:
    speech, _ = models
    with pytest.raises(ValueError, match="at least two models"):
        combine([speech])
    with pytest.raises(ValueError, match=r"tower 'text' of model 2 is another one: weights_hash"):
        combine([speech, pair(tiny_backbone("llama", 31, 4, seed=9), "image", "qwen3", 2)])
    with pytest.raises(ValueError, match=r"tower 'text' of model 2 is another one: .*config_hash"):
        combine([speech, pair(tiny_backbone("llama", 33, 4), "image", "qwen3", 2)])
    with pytest.raises(ValueError, match=r"tower 'speech' was trained before"):
        combine([speech, speech])
    frozen = {"text": tiny_backbone("llama", 31, 4), "speech": tiny_backbone("gpt2", 53, 3)}
    with pytest.raises(ValueError, match=r"two zips for text<-speech, in models 1 and 2"):
        combine([ZipperModel.fuse(frozen, zips=ZipSpec(layers=2)) for _ in range(2)])
    unrelated = ZipperModel.fuse({"a": tiny_backbone("llama", 31, 4), "b": tiny_backbone("gpt2", 53, 3)})
    with pytest.raises(ValueError, match=r"model 2 has \['a', 'b'\], none of the towers before it"):
        combine([speech, unrelated])
    trained = pair(tiny_backbone("llama", 31, 4), "image", "qwen3", 2)
    trained.config.towers["text"]["train"] = "lora"
    with pytest.raises(ValueError, match=r"tower 'text' was trained in model 2 \(train='lora'\)"):
        combine([speech, trained])


def test_input_projections_of_one_tower_stand_at_one_place(tmp_path: Path) -> None:
    """Wherever that is, and in whatever scale; a model without any has no say."""
    tiny_backbone("llama", 31, 4).save_pretrained(tmp_path / "text")

    def fused(other: str, kind: str, **how: object) -> ZipperModel:
        spec = TowerSpec(source=str(tmp_path / "text"), **how)  # type: ignore[arg-type]
        model = ZipperModel.fuse({"text": spec, other: tiny_backbone(kind, 53, 3)}, zips=ZipSpec(layers=2))
        open_gates(model, 0.7)
        return model.eval()

    none, speech = (
        fused("image", "qwen3", input_projection="none"),
        fused("speech", "gpt2", input_projection_layer=1, input_projection_scale=2.0),
    )
    before = speech(collate(SPOKEN, speech.specials)).logits
    for both in (combine([none, speech]), combine([speech, none])):
        assert both.projection_layer("text") == 1
        after = both(collate(SPOKEN, both.specials)).logits
        assert all(torch.equal(before[n], after[n]) for n in before)
    for other in ({}, {"input_projection_layer": 1}):
        with pytest.raises(ValueError, match=r"tower 'text' has .*_layer': 1.*in model 2, .*_scale': 1.0"):
            combine([speech, fused("image", "qwen3", **other)])


def test_codecs_of_a_shared_tower_must_be_one() -> None:
    """The same weights under another tokenizer would read other words."""
    texts = (["abcdefg"], ["hijklmn"])
    found = []
    for letters, other, kind in zip(texts, ("speech", "image"), ("gpt2", "qwen3")):
        codec = TextCodec.train(letters, vocab_size=12)
        found.append(pair(tiny_backbone("llama", 31, 4), other, kind, 1, codecs={"text": codec}))
    with pytest.raises(ValueError, match="codecs of tower 'text' differ"):
        combine(found)


def test_the_command(models: tuple[ZipperModel, ZipperModel], tmp_path: Path) -> None:
    for name, model in zip("ab", models):
        model.save_pretrained(tmp_path / name)
    words = ["combine", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "c")]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    assert '"towers": ["image", "speech", "text"]' in result.stdout
    assert ZipperModel.from_pretrained(tmp_path / "c").names == ["image", "speech", "text"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "exists" in result.stderr
    result = CliRunner().invoke(app, [*words[:3], "--output", str(tmp_path / "a"), "--overwrite"])
    assert result.exit_code == 2
    assert "would replace model" in " ".join(result.stderr.split())
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "c")])
    assert result.exit_code == 0, result.output
