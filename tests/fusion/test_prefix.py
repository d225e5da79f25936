"""The layers of a frozen tower below its first zip, known and not computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import doc, open_gates, tiny_backbone
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from zipper_lm import Document, Segment, TowerSpec, ZipperModel, ZipSpec
from zipper_lm.data.collation import ABSENT, Batch, collate
from zipper_lm.fusion.prefix import check_prefix, prefix_depths, prefix_states
from zipper_lm.fusion.tower import Tower

# Text reads from layer 2 on, and is read at layers 0 and 3.
ZIPS = [
    ZipSpec(reader="text", source="speech", layers=[2, 4], source_layers=[0, 3]),
    ZipSpec(reader="speech", source="text", layers=[0, 1, 3], source_layers=[-1, 0, 3]),
]
KINDS = ("llama", "gpt2", "qwen3", "gemma2")


def backbone(kind: str, layers: int = 5) -> PreTrainedModel:
    if kind != "gemma2":
        return tiny_backbone(kind, 31, layers)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(num_hidden_layers=layers, vocab_size=31, head_dim=8, sliding_window=4, **sizes)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 2
    return Gemma2ForCausalLM(config).eval()


def fused(
    tmp_path: Path,
    kind: str = "llama",
    train: dict[str, str] | None = None,
    zips: list[ZipSpec] = ZIPS,
    **text: Any,
) -> ZipperModel:
    """Text of that family, frozen, and speech, trained, with all that is new opened."""
    backbone(kind).save_pretrained(tmp_path / "text")
    spec = TowerSpec(source=str(tmp_path / "text"), **({"input_projection": "none"} | text))
    towers: Any = {"text": spec, "speech": tiny_backbone("gpt2", 53, 4)}
    torch.manual_seed(0)
    model = ZipperModel.fuse(towers, zips=zips, train=train or {"speech": "full"})
    open_gates(model, 0.7)
    return model.train()


def target(*parts: tuple[str, list[int]]) -> Document:
    return Document(Segment(name, ids=ids, target=number == len(parts) - 1) for number, (name, ids) in enumerate(parts))


DOCUMENTS = [
    target(("speech", [5, 6, 7, 8, 9, 10, 11]), ("text", [4, 9])),
    target(("text", [4, 9, 11, 12, 13]), ("speech", [5, 6])),
    target(("text", [4]), ("speech", [12, 13]), ("text", [7, 8, 3, 5])),
    target(("speech", [9]), ("speech", [8, 4])),
    target(("text", [6, 7])),
]


def with_known(model: ZipperModel, batch: Batch) -> Batch:
    """Each row's states, computed alone."""
    depths, stream = prefix_depths(model, "text"), batch["text"]
    ids, here = stream["input_ids"], stream["segments"] != ABSENT
    known = torch.zeros(*ids.shape, len(depths), model.tower("text").hidden_size)
    for row in range(len(ids)):
        if here[row].any():
            known[row, here[row]] = prefix_states(model.tower("text"), depths, ids[row][here[row]][None])[0]
    return Batch({**batch, "text": {**stream, "known": known}})


def step(model: ZipperModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)  # speech drops out
    loss = model(batch).loss
    assert loss is not None
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def calls_of(model: ZipperModel) -> list[int]:
    """Fills with the text tower's layers that compute."""
    calls: list[int] = []
    for depth, layer in enumerate(model.tower("text").layers):
        layer.register_forward_pre_hook(lambda *_, depth=depth: calls.append(depth))
    return calls


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_the_same(kind: str, side: Any, tmp_path: Path) -> None:
    """Loss and gradients, of ragged rows, of several segments, without the tower and of it alone; and none of the known
    layers computes."""
    model = fused(tmp_path, kind)
    assert prefix_depths(model, "text") == [0, 2]
    check_prefix(model.tower("text"), [0, 2])
    batch = collate(DOCUMENTS, model.specials, side=side)
    calls = calls_of(model)
    loss, gradients = step(model, batch)
    assert calls == [0, 1, 2, 3, 4]
    known = with_known(model, batch)
    calls.clear()
    again, same = step(model, known)
    assert calls == [3, 4]
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    assert same.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(same[name] / scale, gradient / scale, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_that_share_rows(kind: str, tmp_path: Path) -> None:
    """Each document's states are those of it alone, wherever in a row it lies."""
    model = fused(tmp_path, kind)
    documents = [*DOCUMENTS, *(target(("speech", [4 + i, 9]), ("text", [5, 6 + i])) for i in range(3))]
    alone, packed = (collate(documents, model.specials, packing=packing) for packing in (False, True))
    assert len(packed["text"]["input_ids"]) < len(alone["text"]["input_ids"])
    loss, gradients = step(model, packed)
    states, numbers = with_known(model, alone)["text"]["known"], packed["text"]["documents"]
    known = torch.zeros(*numbers.shape, *states.shape[2:])
    for number in range(len(documents)):
        known[numbers == number] = states[number, alone["text"]["segments"][number] != ABSENT]
    again, same = step(model, Batch({**packed, "text": {**packed["text"], "known": known}}))
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(same[name] / scale, gradient / scale, rtol=1e-5, atol=1e-5, msg=name)


def test_of_one_length_it_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    model = fused(tmp_path)
    rows = [target(("speech", [5, 6, i]), ("text", [4, i, 9])) for i in (3, 7, 8)]
    batch = collate(rows, model.specials)
    depths = prefix_depths(model, "text")
    known = prefix_states(model.tower("text"), depths, batch["text"]["input_ids"])
    loss, gradients = step(model, batch)
    again, same = step(model, Batch({**batch, "text": {**batch["text"], "known": known}}))
    assert torch.equal(again, loss)
    assert all(torch.equal(same[name], gradient) for name, gradient in gradients.items())


def test_wrong_states_are_read(tmp_path: Path) -> None:
    """What is known is what counts: else the tests above would compare the tower with itself."""
    model = fused(tmp_path)
    batch = with_known(model, collate(DOCUMENTS, model.specials))
    loss, _ = step(model, batch)
    for kept in (0, 1):  # what speech reads of text, and what text goes on from
        other = batch["text"]["known"].clone()
        other[:, :, kept] += 0.1 * torch.randn_like(other[:, :, kept])
        assert not torch.allclose(step(model, Batch({**batch, "text": {**batch["text"], "known": other}}))[0], loss)


def test_gradient_checkpointing(tmp_path: Path) -> None:
    model = fused(tmp_path)
    batch = collate(DOCUMENTS, model.specials)
    loss, gradients = step(model, batch)
    model.gradient_checkpointing_enable()
    model.train()
    again, same = step(model, with_known(model, batch))
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_how_far_it_reaches(tmp_path: Path) -> None:
    def depths(**text: Any) -> list[int]:
        return prefix_depths(fused(tmp_path, **text), "text")

    assert depths() == [0, 2]
    assert depths(input_projection="residual") == []  # at the embeddings
    assert depths(input_projection="residual", input_projection_layer="first_zip") == [0, 1]  # it enters layer 2
    assert depths(input_projection="residual", input_projection_layer=4) == [0, 2]
    for trained in ("lora", "full"):
        assert prefix_depths(fused(tmp_path, train={"text": trained}), "text") == []
    only_read = fused(tmp_path, zips=ZIPS[1:])
    assert prefix_depths(only_read, "text") == [0, 3, 4]  # it reads nobody: all of it
    batch = collate(DOCUMENTS, only_read.specials)
    loss, _ = step(only_read, batch)
    torch.testing.assert_close(step(only_read, with_known(only_read, batch))[0], loss, rtol=1e-5, atol=1e-6)


def test_states_that_are_not_those_of_the_model(tmp_path: Path) -> None:
    model = fused(tmp_path)
    batch = with_known(model, collate(DOCUMENTS, model.specials))
    text = batch["text"]
    for wrong, says in (
        (text["known"][:, :, :1], r"batch\['text'\]\['known'\] has \[1, 32\] .* keeps \[2, 32\]"),
        (text["known"][:, 1:], r"batch\['text'\]\['known'\] is"),
        (text["known"].long(), r"batch\['text'\]\['known'\] must be a floating-point tensor"),
    ):
        with pytest.raises(ValueError, match=says):
            model(Batch({**batch, "text": {**text, "known": wrong}}))
    at_embeddings = fused(tmp_path, input_projection="residual")
    with pytest.raises(ValueError, match=r"keeps \[0, 32\]"):
        at_embeddings(batch)


class _Sharing(torch.nn.Module):
    """A layer that adds what the first layer had computed beside its state."""

    def __init__(self, layer: torch.nn.Module, shared: dict[str, Tensor], first: bool) -> None:
        super().__init__()
        self.layer, self.shared, self.first = layer, shared, first

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.layer(hidden_states, *args, **kwargs)
        if self.first:
            self.shared["x"] = hidden_states.roll(1, -1)
            return out
        return out + self.shared["x"]


def test_a_family_whose_layers_share_more_is_refused() -> None:
    """Upper layers that use keys, values or anything else of a lower one would be given those of another batch."""
    made, shared = tiny_backbone("llama", 31, 4), {}
    check_prefix(Tower(made, "text"), [0, 1])
    layers = made.model.layers
    for depth in range(4):
        layers[depth] = _Sharing(layers[depth], shared, depth == 0)
    tower = Tower(made, "text", "model.layers")
    shared["x"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"training.prefix_cache: tower 'text' .* LlamaForCausalLM does not go on"):
        forget(tower, shared)


def forget(tower: Tower, shared: dict[str, Tensor]) -> None:
    """As `check_prefix`, but layers forget what they share between forwards, as what is in a forward's own frame."""
    tower.backbone.register_forward_pre_hook(lambda *_: shared.clear())
    check_prefix(tower, [0, 1])


def test_reading_with_a_state_computes(tmp_path: Path) -> None:
    """Only whole documents in training have known states: generation's caches need every layer."""
    from zipper_lm.fusion.reading import State, read

    model = fused(tmp_path).eval()
    batch = with_known(model, collate([doc(("text", [4, 5]), ("speech", [6]))], model.specials))
    calls = calls_of(model)
    read(model, batch, State())
    assert calls == [0, 1, 2, 3, 4]
