"""Products by the faster library: where, and that they are as exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zipper_lm.utils import products
from zipper_lm.utils.products import (
    LEAST,
    LEAST_ROWS,
    QuickLayers,
    by_onednn,
    is_multiplied_here,
    is_quicker,
    packed,
    product,
    quick_layers,
)


@pytest.fixture
def slow_mkl(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """As on a processor where MKL is slow, whatever this one is; the sizes of what oneDNN multiplied."""
    monkeypatch.setattr(products, "is_quicker", lambda: True)
    found: list[tuple[int, ...]] = []
    real = products._linear

    def linear(x: Any, matrix: Any, bias: Any = None) -> Any:
        found.append(tuple(x.shape))
        return real(x, matrix, bias)

    monkeypatch.setattr(products, "_linear", linear)
    return found


@pytest.mark.parametrize(
    ("capability", "vendor", "exact"),
    [("AVX2", "AuthenticAMD", True), ("AVX512", "GenuineIntel", True), ("AVX512", "AuthenticAMD", False)],
)
def test_it_is_not_done_where_it_is_not_quicker_or_not_exact(
    monkeypatch: pytest.MonkeyPatch, capability: str, vendor: str, exact: bool
) -> None:
    """A processor that multiplies by bfloat16 in oneDNN would have trained with three digits, without a word."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(products, "_is_exact", lambda: exact)
    assert is_quicker.__wrapped__() is False


def test_exact_is_what_float32_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is told from float32."""
    real = torch.Tensor.__matmul__

    def rough(left: Any, right: Any) -> Any:
        if left.dtype == torch.float32:
            left, right = (side.bfloat16().float() for side in (left, right))
        return real(left, right)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rough)
    assert products._is_exact() is False


@pytest.mark.parametrize("shape", [(64, 256), (4, 16, 256), (0, 256)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_says_the_same(slow_mkl: list[tuple[int, ...]], shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 256, bias=bias), torch.randn(shape)
    with torch.no_grad():
        want = layer(x)
        with quick_layers(64, 256):
            torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    assert slow_mkl == ([shape] if x.numel() else [])


def test_what_is_not_plain_float32_is_itself(slow_mkl: list[tuple[int, ...]]) -> None:
    """Gradients, small products, other dtypes, and subclasses that multiply in their own way."""

    class Own(torch.Tensor):
        pass

    x, matrix = torch.randn(64, 256), torch.randn(256, 256)
    with QuickLayers():
        F.linear(x, matrix.requires_grad_()).sum().backward()
        with torch.no_grad():
            assert torch.equal(F.linear(x[:1], matrix), torch.nn.functional.linear(x[:1], matrix))
            assert F.linear(x.bfloat16(), matrix.bfloat16()).dtype == torch.bfloat16
            assert isinstance(F.linear(x.as_subclass(Own), matrix), Own)
    assert slow_mkl == []
    assert matrix.grad is not None


@pytest.mark.parametrize("why", ["small", "set", "autocast", "slower"])
def test_where_it_is_not_worth_it_or_not_ours_nothing_changes(
    slow_mkl: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "slower":
        monkeypatch.setattr(products, "is_quicker", lambda: False)
    rows = 1 if why == "small" else LEAST
    with torch.autocast("cpu", enabled=why == "autocast"):
        if why == "set":
            with by_onednn():
                assert not isinstance(quick_layers(rows, 256), QuickLayers)
        else:
            assert not isinstance(quick_layers(rows, 256), QuickLayers)
    if why != "slower":
        assert isinstance(quick_layers(LEAST, 256), QuickLayers)


def test_few_rows_are_left_alone(slow_mkl: list[tuple[int, ...]]) -> None:
    """They wait for a matrix as long by either library, and each function of a step takes longer inside: a token of a
    tower of 135M cost a tenth more."""
    assert not isinstance(quick_layers(LEAST_ROWS - 1, 4096), QuickLayers)
    assert isinstance(quick_layers(LEAST_ROWS, 4096), QuickLayers)


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_a_matrix_in_another_order_multiplies_the_same(rows: int) -> None:
    """Compiled, too: an operator that compilers leave alone."""
    torch.manual_seed(0)
    x, matrix = torch.randn(rows, 40), torch.randn(24, 40)
    ordered = packed(matrix, 16)
    torch.testing.assert_close(product(x, ordered), x @ matrix.T, rtol=1e-5, atol=1e-5)
    compiled = torch.compile(lambda given: product(given + 1, ordered) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), (x + 1) @ matrix.T * 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_is_multiplied_where_onednn_takes_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operators are asked by names that are its own affair: they are there in each version that we allow."""
    assert is_multiplied_here(torch.float32)
    name = products._HALF[dtype]
    assert is_multiplied_here(dtype) is getattr(torch.ops.mkldnn, name)()
    for told in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda told=told: told)
        assert is_multiplied_here(dtype) is told
