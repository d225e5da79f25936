"""What a user of transformers and torch does with any model: it works, or is refused by name with the way on."""

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import doc, ids_of, tiny_backbone, tiny_model
from transformers import AutoConfig, AutoModel

from zipper_lm import SingleDecoder
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.collation import collate
from zipper_lm.models.baseline.expand import expand

DOCUMENTS = [doc(("speech", [5, 6, 7]), ("text", [4, 9]), target=True), doc(("text", [4]), ("speech", [9, 8]))]


def made(kind: str) -> Any:
    if kind == "ZipperModel":
        return tiny_model(gate=0.5)
    codec = TextCodec.train(["one two three", "three one two"], vocab_size=31)
    torch.manual_seed(0)
    return expand("text", tiny_backbone("llama", 31), {"text": codec, "speech": codec})


@pytest.fixture(params=["ZipperModel", "SingleDecoder"])
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


@pytest.mark.parametrize(
    ("method", "arguments", "way"),
    [
        ("resize_token_embeddings", (100,), "resize the backbone before it is fused"),
        ("resize_position_embeddings", (100,), "before it is fused"),
        ("set_input_embeddings", (torch.nn.Embedding(3, 3),), "a vocabulary belongs to its codec"),
        ("set_output_embeddings", (torch.nn.Linear(3, 3),), "a vocabulary belongs to its codec"),
        ("add_adapter", (None,), 'fuse with train={NAME: "lora"}'),
        ("load_adapter", ("somewhere",), 'fuse with train={NAME: "lora"}'),
        ("add_model_tags", (["new"],), "write tags into the model card"),
        ("register_for_auto_class", (), "once zipper_lm is imported"),
    ],
)
def test_what_cannot_be_followed_says_so(model: Any, method: str, arguments: tuple[Any, ...], way: str) -> None:
    """Adapters went into zips, whose checkpoint could not be loaded then; tags and classes were taken and dropped."""
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=rf"{type(model).__name__}.{method} cannot be followed: .*{re.escape(way)}"):
        getattr(model, method)(*arguments)
    assert set(model.state_dict()) == before


def test_embeddings(model: Any) -> None:
    if isinstance(model, SingleDecoder):
        assert model.get_input_embeddings().num_embeddings == 53
        assert model.get_output_embeddings().out_features == 53
        return
    with pytest.raises(NotImplementedError, match=r"model.tower\(NAME\).backbone.get_input_embeddings\(\)"):
        model.get_input_embeddings()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(model: Any, reentrant: bool) -> None:
    batch = collate(DOCUMENTS, model.specials)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train().zero_grad()
        torch.manual_seed(0)
        model(batch).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
    model.disable_input_require_grads()


def way_of(model: Any, way: str) -> Any:
    if way == "deepcopy":
        return copy.deepcopy(model)
    if way == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_the_same_and_apart(model: Any, way: str) -> None:
    batch, settings = collate(DOCUMENTS, model.specials), {"speech": {"max_new_tokens": 4}}
    logits = model(batch).logits
    written = ids_of(model.generate(DOCUMENTS, ["speech"], settings=settings))
    twin = way_of(model, way)
    assert all(torch.equal(v, logits[k]) for k, v in twin(batch).logits.items())
    assert ids_of(twin.generate(DOCUMENTS, ["speech"], settings=settings)) == written
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.equal(v, logits[k]) for k, v in model(batch).logits.items())


def test_a_state_dict_comes_back(model: Any) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = made(type(model).__name__)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert str(other.load_state_dict(torch.load(file, weights_only=True))) == "<All keys matched successfully>"
    batch = collate(DOCUMENTS, model.specials)
    assert all(torch.equal(v, other(batch).logits[k]) for k, v in model(batch).logits.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_reads_writes_and_is_saved(model: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model.half() if dtype == torch.float16 else model.bfloat16()
    assert (model.dtype, model.device.type) == (dtype, "cpu")
    assert model(collate(DOCUMENTS, model.specials)).loss.isfinite()
    settings = {"speech": {"max_new_tokens": 4}}
    written = ids_of(model.generate(DOCUMENTS, ["speech"], settings=settings))
    model.save_pretrained(tmp_path / "model", card=False)
    again = type(model).from_pretrained(tmp_path / "model").to(dtype)
    assert ids_of(again.generate(DOCUMENTS, ["speech"], settings=settings)) == written


def test_counts_and_print(model: Any) -> None:
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert 0 < model.num_parameters(exclude_embeddings=True) < model.num_parameters()
    assert 0 < model.num_parameters(only_trainable=True) <= model.num_parameters()
    assert model.get_memory_footprint() >= 4 * model.num_parameters()
    assert "LlamaForCausalLM" in str(model)


def test_from_a_config(model: Any, tmp_path: Path) -> None:
    """`AutoModel.from_config(config, dtype=..., attn_implementation=...)` left towers in float32, with sdpa."""
    fresh = AutoModel.from_config(model.config, dtype="bfloat16", attn_implementation="eager")
    assert type(fresh) is type(model)
    assert fresh.training
    assert {(b.dtype, b.config._attn_implementation) for b in fresh.backbones().values()} == {(torch.bfloat16, "eager")}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert {n: p.shape for n, p in fresh.named_parameters()} == shapes
    with pytest.raises(ValueError, match=f"{type(model).__name__}.from_config: unknown argument nonsense=1"):
        AutoModel.from_config(model.config, nonsense=1)
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert {n: p.shape for n, p in AutoModel.from_config(config).named_parameters()} == shapes
    config._attn_implementation = "somebody/kernel"
    with pytest.raises(ValueError, match="somebody/kernel"):
        AutoModel.from_config(config)
