from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import bare_logits, doc, open_gates, tiny_backbone
from transformers import GPT2Config, GPT2LMHeadModel

from zipper_lm import TowerSpec, ZipperModel, ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.fusion.stream import stream_sizes
from zipper_lm.models.assemble import connect
from zipper_lm.utils.shapes import without_values

DOCUMENTS = [doc(("speech", [5, 9, 7]), ("text", [4, 8]), target=True)]


def test_sizes_of_a_stream() -> None:
    """Before the first layer and after each, of the median token: one that is a thousand times as large, as some towers
    have, does not count."""
    backbone = tiny_backbone("llama", 31, 3)
    with torch.no_grad():
        backbone.model.embed_tokens.weight.copy_(torch.full((31, 32), 0.25))
        backbone.model.embed_tokens.weight[[4, 9]] *= 1000
        for block in backbone.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    assert stream_sizes(backbone, "text") == [0.25] * 4
    with torch.no_grad():
        backbone.model.embed_tokens.weight.zero_()  # no measure
    assert stream_sizes(backbone, "text") == [1.0] * 4


def fused(folder: Path, **how: object) -> ZipperModel:
    """Zips of two layers of four and six; `how` is of the text tower."""
    tiny_backbone("llama", 31, 4).save_pretrained(folder / "text")
    zips = [ZipSpec(layers=[1, 3], scale="stream"), ZipSpec(reader="speech", layers=2, scale=2.0)]
    text = TowerSpec(source=str(folder / "text"), **how)  # type: ignore[arg-type]
    return ZipperModel.fuse({"text": text, "speech": tiny_backbone("gpt2", 53, 6)}, zips=zips)


@pytest.mark.parametrize("place", [0, "first_zip"])
def test_scales_are_measured_once(tmp_path: Path, place: object) -> None:
    """Each where it stands; the new model is the bare towers bit for bit, what is saved says the numbers, and what is
    loaded computes with them."""
    model = fused(tmp_path, input_projection_layer=place, input_projection_scale="stream")
    sizes = stream_sizes(model.tower("text").backbone, "text")
    assert len(set(sizes)) == 5
    specs = {spec.reader: spec.scale for spec in model.config.zip_specs}
    assert specs == {"text": [sizes[2], sizes[4]], "speech": 2.0}
    layer = model.config.tower_specs["text"].input_projection_layer
    assert layer == (0 if place == 0 else 1)
    assert model.input_projections["text"].scale == sizes[layer]
    assert [model.zip_layer("text", "speech", k).scale for k in range(2)] == specs["text"]
    batch = collate(DOCUMENTS, model.specials)
    for name, logits in model(batch).logits.items():
        assert torch.equal(logits, bare_logits(model, name, batch[name]))
    open_gates(model, 0.7)
    model.save_pretrained(tmp_path / "model")
    loaded = ZipperModel.from_pretrained(tmp_path / "model")
    assert loaded.config.zips == model.config.zips
    expected = model(batch).logits
    assert all(torch.equal(logits, expected[name]) for name, logits in loaded(batch).logits.items())
    model.input_projections["text"].scale = 1.0
    assert not torch.equal(model(batch).logits["text"], expected["text"])


def test_a_model_without_values_has_a_scale_of_one() -> None:
    """It is planned: nothing can be measured."""
    with without_values():
        backbone = tiny_backbone("llama", 31, 4)
    assert stream_sizes(backbone, "text") == [1.0] * 5


def test_a_tower_with_few_positions_is_measured_in_what_it_has() -> None:
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=31, n_positions=6, bos_token_id=0, eos_token_id=1)
    assert len(stream_sizes(GPT2LMHeadModel(config), "text")) == 3


def learned(size: float, scale: object) -> torch.Tensor:
    """Losses of a few steps of Adam over a frozen text tower whose stream is `size` times as large, by what writes into
    it; its norms take that away again, so that it computes the same."""
    text, speech = tiny_backbone("llama", 31, 4), tiny_backbone("gpt2", 53, 4)
    with torch.no_grad():
        text.lm_head.weight = torch.nn.Parameter(text.lm_head.weight.clone())
        text.model.embed_tokens.weight.mul_(size)
        for block in text.model.layers:
            block.self_attn.o_proj.weight.mul_(size)
            block.mlp.down_proj.weight.mul_(size)
    torch.manual_seed(0)
    specs = {name: TowerSpec(source="", backbone={}) for name in ("text", "speech")}
    specs["text"] = replace(specs["text"], input_projection_scale=scale)  # type: ignore[arg-type]
    zips = ZipSpec(layers=2, scale=scale)  # type: ignore[arg-type]
    model = connect(ZipperModel, specs, {"text": text, "speech": speech}, zips, None)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        losses.append(model(collate(DOCUMENTS, model.specials)).loss)
        adam.zero_grad()
        losses[-1].backward()
        adam.step()
    return torch.stack(losses).detach()


def test_in_its_scale_a_tower_of_any_size_learns_alike() -> None:
    """Without, what is new drowns in a large stream: Adam moves it by its learning rate, whatever it is added to."""
    plain = learned(1.0, "stream")
    torch.testing.assert_close(learned(64.0, "stream"), plain, rtol=0.02, atol=0.02)
    assert plain[0] - plain[-1] > 1.5 * (plain[0] - learned(64.0, 1.0)[-1])
