"""What fusing finds beside a backbone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import doc, tiny_backbone
from tiny_recipes import plain_recipe, workshop

from zipper_lm import Document, Segment, ZipperModel
from zipper_lm.data.collation import collate
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.jobs.prepare import prepare
from zipper_lm.jobs.recipes.reader import build
from zipper_lm.jobs.recipes.schema import FuseRecipe
from zipper_lm.jobs.towers import build_model


def test_no_tokenizer_no_codec(tmp_path: Path) -> None:
    """transformers makes an empty tokenizer up for a folder without one."""
    for name, kind, vocab in (("text", "gpt2", 31), ("speech", "llama", 53)):
        tiny_backbone(kind, vocab).save_pretrained(tmp_path / name)
    model = ZipperModel.fuse({"text": tmp_path / "text", "speech": tmp_path / "speech"})
    assert model.processor is not None
    assert model.processor.codecs == {}
    assert model.specials["text"] == (0, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_trained_is_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Towers took the dtype of their checkpoints, adapters that of their towers: of bfloat16 weights most do not
    move at small rates, and nothing said so. What is frozen stays as it is stored."""
    for name, kind, vocab in (("text", "gpt2", 31), ("speech", "llama", 53)):
        tiny_backbone(kind, vocab).to(dtype).save_pretrained(tmp_path / name)
    towers = {name: tmp_path / name for name in ("text", "speech")}
    model = ZipperModel.fuse(towers, train={"text": "lora", "speech": "full"})
    kinds = {requires_grad: {p.dtype for p in of} for requires_grad, of in by_training(model).items()}
    assert kinds == {True: {torch.float32}, False: {dtype}}
    model.save_pretrained(tmp_path / "model")
    again = ZipperModel.from_pretrained(tmp_path / "model")
    assert {p.dtype for p in by_training(again)[True]} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert ZipperModel.fuse(towers, train={"speech": "full"}, dtype=dtype).tower("speech").backbone.dtype == dtype
    own = {**towers, "speech": TowerSpec(source=str(towers["speech"]), train="full", config={"dtype": "float64"})}
    model = ZipperModel.fuse(own)
    assert [model.tower(name).backbone.dtype for name in own] == [dtype, torch.float64]


def by_training(model: ZipperModel) -> dict[bool, list[torch.nn.Parameter]]:
    return {trained: [p for p in model.parameters() if p.requires_grad == trained] for trained in (True, False)}


def test_adapters_of_a_bf16_tower_learn(tmp_path: Path) -> None:
    """A step of 1e-4 moves every adapter weight that has a gradient; in bfloat16 most would stay where they are."""
    tiny_backbone("gpt2", 31).to(torch.bfloat16).save_pretrained(tmp_path / "text")
    speech = tiny_backbone("llama", 53)
    model = ZipperModel.fuse({"text": tmp_path / "text", "speech": speech}, train={"text": "lora"}).train()
    adapters = {n: p for n, p in model.tower("text").backbone.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in adapters.items()}
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-4, weight_decay=0.0)
    document = Document([Segment("speech", ids=[7, 8, 9]), Segment("text", ids=[5, 6, 7, 8], target=True)])
    for _ in range(2):  # lora_B starts at zero, so that lora_A has a gradient from the second step on
        loss = model(collate([document], model.specials)).loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in adapters.items():
        assert parameter.grad is not None
        moved = parameter.detach() != before[name]
        assert moved[parameter.grad != 0].all(), name


def _cut(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _without_eos(folder: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file := folder / name).is_file():
            said = json.loads(file.read_text())
            file.write_text(json.dumps({k: v for k, v in said.items() if k != "eos_token"}))


def _without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_cut, "text codec: no tokenizer at .*text can be used: .*(EOF|expected|Expecting|Unterminated|line)"),
        (_without_eos, "tokenizer has no eos_token, so a segment could never end"),
        (_without_tokenizer, r"text has neither codec\.json nor a tokenizer \(tokenizer\.json"),
    ],
)
def test_why_a_tower_has_no_codec_is_said(change: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    """Whatever was wrong with a tokenizer, all that was said was that there is no codec."""
    shutil.copytree(workshop() / "text", tmp_path / "text")
    (tmp_path / "text/codec.json").unlink()
    change(tmp_path / "text")
    towers = {"text": tmp_path / "text", "speech": workshop() / "speech"}
    model = ZipperModel.fuse(towers)
    assert len(model.generate([doc(("text", [5, 6]))], ["text"], settings={"text": {"max_new_tokens": 2}})[0]) == 2
    with pytest.raises(ValueError, match=f"no codec for modality 'text': .*{reason}"):
        model.generate([Document([("text", "one")])], ["speech"])
    named = {name: str(path) for name, path in towers.items()}
    recipe = build(FuseRecipe, plain_recipe(tmp_path / "model", towers=named, architecture="single-decoder"))
    with pytest.raises(ValueError, match=f"single-decoder needs a codec for every modality.*{reason}"):
        build_model(recipe)
    with pytest.raises(ValueError, match=f"have no codec beside them .*{reason}"):
        prepare(replace(recipe, architecture="zipper"), tmp_path / "prepared")
