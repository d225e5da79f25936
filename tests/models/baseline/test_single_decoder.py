"""The baseline has Zipper's face, learns, is saved and loaded, and writes what its forward says."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_backbone
from transformers import PreTrainedModel

from zipper_lm import Document, Segment
from zipper_lm.data.collation import IGNORED, collate
from zipper_lm.fusion import head
from zipper_lm.fusion.tower_spec import TowerSpec
from zipper_lm.models.baseline.expand import expand
from zipper_lm.models.baseline.single_decoder import SingleDecoder


class Ids:
    """A codec of ids that stand for themselves; BOS, EOS and PAD are the last three."""

    kind = "ids"
    rate = None

    def __init__(self, size: int, first_special: int) -> None:
        self.vocab_size = size
        self.bos_id, self.eos_id, self.pad_id = range(first_special, first_special + 3)

    def encode(self, values):
        return [list(v) for v in values]

    def decode(self, ids):
        return [tuple(row) for row in ids]


def single(kind: str = "llama", backbone: PreTrainedModel | None = None, **kwargs) -> SingleDecoder:
    torch.manual_seed(0)
    codecs = {"text": Ids(31, 0), "speech": Ids(20, 17)}
    return expand("text", backbone or tiny_backbone(kind, 31), codecs, **kwargs)  # type: ignore[arg-type]


DOCUMENTS = [
    Document([Segment("speech", ids=[3, 4, 5]), Segment("text", ids=[6], target=True)]),
    Document([Segment("text", ids=[7, 8]), Segment("speech", ids=[9, 10], target=True)]),
]


@pytest.mark.parametrize("kind", ["llama", "gpt2-tied"])
def test_old_ids_keep_their_embeddings(kind):
    backbone = tiny_backbone(kind, 31)
    before = backbone.get_input_embeddings().weight.detach().clone()
    model = single(backbone=backbone)
    after = model.backbone.get_input_embeddings().weight
    assert after.shape[0] == 51
    assert torch.equal(after[:31], before)
    assert model.backbone.get_output_embeddings().weight.shape[0] == 51


@pytest.mark.parametrize("train", ["full", "lora"])
def test_it_is_float32_whatever_its_checkpoint_is(train, tmp_path):
    """It took the checkpoint's bfloat16, in which small updates are lost."""
    tiny_backbone("llama", 31).to(torch.bfloat16).save_pretrained(tmp_path / "text")
    codecs = {"text": Ids(31, 0), "speech": Ids(20, 17)}
    model = expand("text", tmp_path / "text", codecs, train=train)  # type: ignore[arg-type]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.processor = None  # this codec has no files
    model.save_pretrained(tmp_path / "m")
    again = SingleDecoder.from_pretrained(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    half = TowerSpec(source=str(tmp_path / "text"), config={"dtype": "bfloat16"})
    coarse = expand("text", half, codecs, train=train)  # type: ignore[arg-type]
    assert coarse.backbone.dtype == torch.bfloat16, "as it was asked for"
    coarse.processor = None
    coarse.save_pretrained(tmp_path / "coarse")
    fine = SingleDecoder.from_pretrained(tmp_path / "coarse", dtype=torch.float32)
    with torch.no_grad():
        for parameter in fine.parameters():
            parameter.add_(1e-6)
    fine.save_pretrained(tmp_path / "fine")
    again = SingleDecoder.from_pretrained(tmp_path / "fine")
    assert all(torch.equal(a, b) for a, b in zip(fine.parameters(), again.parameters(), strict=True))


def test_losses_are_the_backbones_own_by_modality():
    model = single()
    output = model(collate(DOCUMENTS, model.specials))
    stream = torch.tensor([[0, 7, 8, 1, 31 + 17, 31 + 9, 31 + 10, 31 + 18]])
    labels = torch.tensor([[IGNORED] * 5 + [40, 41, 49]])
    theirs = model.backbone(input_ids=stream, labels=labels).loss
    torch.testing.assert_close(output.losses["speech"], theirs)
    torch.testing.assert_close(output.loss, output.losses["speech"] + output.losses["text"])


def test_an_id_of_another_modality_is_refused():
    model = single()
    with pytest.raises(ValueError, match="text: token id 31 out of range, it has ids 0 to 30"):
        model(collate([Document([Segment("text", ids=[31], target=True)])], model.specials))


def test_what_is_written_is_the_likeliest_of_its_modality():
    model = single()
    given = Document([Segment("speech", ids=[3, 4, 5])])
    (alone,) = model.generate([given], ["text"], settings={"text": {"max_new_tokens": 6}})
    longer = Document([Segment("speech", ids=[3, 4, 5, 6, 7, 8])])
    together = model.generate([given, longer], ["text"], settings={"text": {"max_new_tokens": 6}})
    assert together[0][1].ids == alone[1].ids
    ids = [31 + 17, 34, 35, 36, 31 + 18, 0]
    for written in alone[1].ids:
        logits = model.backbone(input_ids=torch.tensor([ids])).logits[0, -1]
        logits[31:] = logits[0] = logits[2] = -torch.inf
        assert int(logits.argmax()) == written
        ids.append(written)


def test_a_schedule_of_several_with_given_segments_in_between():
    model = single()
    settings = {"text": {"max_new_tokens": 3}, "speech": {"max_new_tokens": 4, "guidance_scale": 2.0}}
    (document,) = model.generate([Document([("text", [7])])], ["speech", ("text", [8, 9]), "speech"], settings=settings)
    assert document.modalities == ["text", "speech", "text", "speech"]
    for segment in (document[1], document[3]):
        assert all(0 <= i < 17 for i in segment.ids)
        assert segment.value == tuple(segment.ids)


def test_guidance_and_stop_threshold_matter():
    model = single()
    given = [Document([Segment("text", ids=[7, 8, 9, 10])])]
    plain, guided, stopped = (
        model.generate(given, ["speech"], settings={"speech": {"max_new_tokens": 12, **more}})[0][1].ids
        for more in ({}, {"guidance_scale": 5.0}, {"stop_threshold": 1e-6})
    )
    assert plain != guided
    assert stopped == []


@pytest.mark.parametrize(
    ("schedule", "message"),
    [("auto", "does not say who speaks next"), (["smell"], "schedule names 'smell'"), ([], "non-empty")],
)
def test_schedules_that_cannot_be(schedule, message):
    with pytest.raises(ValueError, match=message):
        single().generate(DOCUMENTS, schedule)


def test_names_given_as_a_set_are_saved(tmp_path):
    """PEFT takes a set of names, and JSON does not: such a decoder trained, and could not be saved."""
    lora = {"target_modules": {"v_proj", "q_proj"}}
    for name, model in (("a", single(train="lora", lora=lora)), ("b", single().with_adapters(lora))):
        model.processor = None  # these codecs cannot be saved
        model.save_pretrained(tmp_path / name)
        again = SingleDecoder.from_pretrained(tmp_path / name)
        assert again.config.spec.lora == {"target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2-tied"])
def test_a_saved_one_is_the_same_and_goes_on_training(train, kind, tmp_path):
    model = single(kind, train=train)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("lora" in n for n in trained) == (train == "lora")
    assert any("lm_head" in n or "wte" in n for n in trained)
    assert all(p.requires_grad for p in model.parameters()) == (train == "full")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    model.processor = None  # this codec has no files
    model.save_pretrained(tmp_path / "m")
    files = {"config.json", "model.safetensors", "README.md", "architecture.png"}
    assert {p.name for p in (tmp_path / "m").iterdir()} == files
    again = SingleDecoder.from_pretrained(tmp_path / "m")
    batch = collate(DOCUMENTS, model.specials)
    assert torch.equal(model(batch).loss, again(batch).loss)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(trained)
    with pytest.raises(ValueError, match="already holds a checkpoint"):
        model.save_pretrained(tmp_path / "m")


def test_a_damaged_checkpoint_is_refused(tmp_path):
    model = single()
    model.processor = None
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    removed = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != removed}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing tensors"):
        SingleDecoder.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path, overwrite=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["modalities"][1]["bos"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json was changed"):
        SingleDecoder.from_pretrained(tmp_path)


def test_what_a_backbone_ships_for_generation_is_not_asked_for():
    model, settings = single(), {"text": {"max_new_tokens": 6}}
    documents = [Document([Segment("speech", ids=[3, 4, 5])])]
    plain = model.generate(documents, ["text"], settings=settings, decode=False)[0][-1].ids
    model.backbone.generation_config.update(num_beams=3, repetition_penalty=5.0)
    assert model.generate(documents, ["text"], settings=settings, decode=False)[0][-1].ids == plain


def test_what_cannot_be_expanded():
    backbone = tiny_backbone("llama", 31)
    with pytest.raises(ValueError, match="needs codecs for 'text' and one more"):
        expand("text", backbone, {"text": Ids(31, 0)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="the codec has 32 ids, the backbone's vocabulary only 31"):
        expand("text", backbone, {"text": Ids(32, 0), "speech": Ids(20, 17)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="'full' or by 'lora', got 'frozen'"):
        expand("text", backbone, {"text": Ids(31, 0), "speech": Ids(20, 17)}, train="frozen")  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="expand: unknown argument nonsense=1"):
        expand("text", backbone, {"text": Ids(31, 0), "speech": Ids(20, 17)}, nonsense=1)  # type: ignore[dict-item]


def test_unimodal_loss_is_the_sum_over_rows():
    model = single()
    loss, count = model.unimodal_loss("text", [[5, 6], [7]])
    parts = [model.unimodal_loss("text", [row]) for row in ([5, 6], [7])]
    assert count == 5
    assert loss == pytest.approx(sum(p[0] for p in parts), rel=1e-5)


def test_settings_are_counted_within_the_modality():
    model = single()
    given = [Document([Segment("text", ids=[7, 8, 9])])]
    settings = {"max_new_tokens": 1}
    first = model.generate(given, ["speech"], settings={"speech": settings})[0][1].ids[0]
    other = model.generate(given, ["speech"], settings={"speech": settings | {"suppress_tokens": [first]}})[0][1].ids[0]
    assert other != first
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 goes with greedy search"):
        model.generate(given, ["speech"], settings={"speech": settings | {"guidance_scale": 2.0, "num_beams": 2}})


@pytest.mark.parametrize("kind", ["llama", "gpt2-tied", "gemma2"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_large_vocabulary_is_scored_by_parts(kind: str, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Zipper: the baseline would pay for logits that Zipper does not hold."""
    model = single(kind).eval()
    batch = collate(DOCUMENTS, model.specials, packing=packing)
    found = []
    for numbers in (head.HELD, 100):
        monkeypatch.setattr(head, "HELD", numbers)
        model.zero_grad()
        output = model(batch, return_logits=False)
        assert output.logits is None
        output.loss.backward()
        found.append((output.losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (whole, gradients), (parts, others) = found
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)
