"""Matrices in fewer bytes: close to the backbone they were made of, which they leave alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.tiny import tiny_backbone, tiny_model
from zipper_lm.generation.engine import weights
from zipper_lm.generation.engine.weights import NarrowLinear, weights_as
from zipper_lm.utils import products

IDS = torch.tensor([[0, 5, 9, 7, 3], [0, 4, 4, 8, 6]])


def structural(backbone: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules of its own that shares every tensor."""
    return copy.deepcopy(backbone, {id(t): t for t in (*backbone.parameters(), *backbone.buffers())})


def logits(backbone: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return backbone(input_ids=ids).logits


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt2-tied", "qwen3", "mamba", "lfm2"])
def test_a_copy_says_nearly_the_same_and_the_backbone_exactly(kind: str, form: str) -> None:
    backbone = tiny_backbone(kind, 31)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    said = logits(backbone)
    narrow = weights_as(structural(backbone), form)  # type: ignore[arg-type]
    change = (logits(narrow) - said).norm() / said.norm()
    assert 0 < change < 0.05
    assert torch.equal(logits(backbone), said)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    shared = {t.data_ptr() for t in before_and_now(backbone)}
    new = [t for t in before_and_now(narrow) if t.data_ptr() not in shared]
    assert {t.dtype for t in new} <= {torch.bfloat16, torch.int8, torch.float32}
    assert all(t.ndim == 1 for t in new if t.dtype == torch.float32), "only scales are new in 32 bits"


def before_and_now(backbone: nn.Module) -> list[Tensor]:
    return [*backbone.parameters(), *backbone.buffers()]


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("shape", [(1, 1), (20, 31), (5, 7), (48, 32)])
@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 3), (0, 2)])
def test_any_size(form: str, shape: tuple[int, int], rows: tuple[int, ...]) -> None:
    """torch's int8 kernel reads 16 columns at once: a matrix of 20 was multiplied with what lies behind it in memory,
    or the process died."""
    torch.manual_seed(0)
    layer = nn.Linear(*shape)
    made = weights_as(nn.Sequential(copy.deepcopy(layer)), form)  # type: ignore[arg-type]
    x = torch.randn(*rows, shape[0])
    want = layer(x)
    assert made(x).shape == want.shape
    assert torch.allclose(made(x), want, atol=0.05)
    assert torch.allclose(made[0].weight, layer.weight, atol=0.02)


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_as_eager(form: str, rows: int) -> None:
    torch.manual_seed(0)
    layers = weights_as(nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 9, bias=False)), form)  # type: ignore[arg-type]
    x = torch.randn(rows, 20)
    with torch.no_grad():
        compiled = torch.compile(layers, fullgraph=True, dynamic=False, backend="aot_eager")
        assert torch.allclose(compiled(x), layers(x), atol=0.02)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("out", [48, 9])
def test_a_loop_reads_a_large_matrix_from_several_places(rows: int, out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one place alone memory gave less at a time: a token of four layers of 135M's shape, with
    the head, took a third longer."""
    monkeypatch.setattr(weights, "LEAST_MATRIX", 20 * out)
    torch.manual_seed(0)
    layer, x = nn.Linear(20, out), torch.randn(rows, 20)
    made, graphs = weights_as(nn.Sequential(copy.deepcopy(layer)), None, rows=rows, compiled=True), []

    def look(graph: Any, example: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    def places() -> float:
        graphs.clear()
        with torch.no_grad():
            result = torch.compile(made, fullgraph=True, dynamic=False, backend=look)(x)
        torch.testing.assert_close(result, layer(x))
        return sum(name == "sum" for name in graphs[0]) / rows

    assert places() == {48: {1: 4, 2: 4, 3: 2, 4: 2, 8: 1}[rows], 9: 1}[out]
    monkeypatch.setattr(weights, "LEAST_MATRIX", 20 * out + 1)
    torch._dynamo.reset()
    assert places() == 1, "a small one lies in the processor's own memory"


def test_a_row_of_zeros_stays_one() -> None:
    layer = nn.Linear(16, 4, bias=False)
    layer.weight.data[2] = 0
    made = weights_as(nn.Sequential(layer), "int8")
    assert not made(torch.randn(3, 16))[:, 2].any()


def test_adapters_are_left_alone() -> None:
    model = tiny_model(train={"text": "lora"})
    tower = model.tower("text")
    made = weights_as(structural(tower.backbone), "int8", keep=tower.adapter_names)
    kept = [m for m in made.modules() if type(m) is nn.Linear]
    assert len(kept) == len(tower.adapter_names)
    assert any(isinstance(m, NarrowLinear) for m in made.modules())
    assert torch.isfinite(logits(made)).all()


def test_sixteen_bits_are_not_copied() -> None:
    backbone = tiny_backbone("llama", 31).to(torch.bfloat16)
    made = weights_as(structural(backbone), "bf16")
    assert not any(isinstance(m, NarrowLinear) for m in made.modules())
    said = logits(backbone).float()
    assert (logits(weights_as(structural(backbone), "int8")).float() - said).norm() / said.norm() < 0.1


def test_what_cannot_be_followed_is_refused() -> None:
    backbone = tiny_backbone("llama", 31)
    assert weights_as(backbone, None) is backbone
    with pytest.raises(ValueError, match=r"'int4'.*bf16, int8"):
        weights_as(backbone, "int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no linear layer"):
        weights_as(nn.Sequential(nn.Embedding(3, 4)), "int8")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt2-tied"])
def test_where_onednn_is_quicker_a_step_multiplies_by_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "is_quicker", lambda: True)
    monkeypatch.setattr(products, "LEAST", 1)
    backbone = tiny_backbone(kind, 31)

    def ordered(made: nn.Module) -> int:
        return sum(isinstance(m, NarrowLinear) and m.ordered is not None for m in made.modules())

    made = weights_as(structural(backbone), None, rows=weights.FEWER + 1, compiled=True)
    assert ordered(made) >= 4
    assert not ordered(weights_as(structural(backbone), None, rows=weights.FEWER, compiled=True)), "a loop is as fast"
    torch.testing.assert_close(logits(made), logits(backbone), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(products, "LEAST", 2**30)
    assert not [m for m in weights_as(structural(backbone), None, rows=9).modules() if isinstance(m, NarrowLinear)]
