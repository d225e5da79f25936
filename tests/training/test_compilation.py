"""Compiled layer by layer, a model is what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_recipes import tiny_recipe
from tiny_steps import one_step

from zipper_lm.jobs.fuse import fuse


def test_compiled_layers_have_the_same_gradients() -> None:
    """``torch_compile: true`` compiled the whole model and died in its first step; guided attention watches on."""
    torch.compiler.reset()
    compiled, losses = one_step(4, 1, torch_compile_backend="eager")
    plain, expected = one_step(4, 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # type: ignore[attr-defined]
    assert losses == expected
    assert compiled.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient)


@pytest.mark.parametrize("architecture", ["zipper", "single-decoder"])
def test_a_recipe_may_say_so(architecture: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"arguments": {"disable_tqdm": True, "torch_compile_backend": "eager"}}
    same: dict[str, Any] = {"arguments": {"disable_tqdm": True}}
    runs = [
        fuse(tiny_recipe(tmp_path / str(n), architecture=architecture, training=training, tasks={"->text": 1}))
        for n, training in enumerate((more, same))
    ]
    compiled, plain = ([e["loss"] for e in run["history"] if "loss" in e] for run in runs)
    assert compiled == plain
