"""What a file of weights holds, and what a module would."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from zipper_lm.utils.weights import TooMany, check_shapes, on_meta, shapes_of, stored_shapes


def test_shapes_come_off_the_header(tmp_path: Path) -> None:
    layer = nn.Linear(3, 5)
    save_file(layer.state_dict(), tmp_path / "a.safetensors")
    found = stored_shapes(tmp_path / "a.safetensors")
    assert found == shapes_of(layer) == {"weight": (5, 3), "bias": (5,)}
    check_shapes("here", found, shapes_of(layer))
    with pytest.raises(ValueError, match=r"here: missing or extra tensors \['bias'\]"):
        check_shapes("here", {"weight": (5, 3)}, found)
    with pytest.raises(ValueError, match=r"here: weight has shape \[5, 3\], the config asks for \[5, 4\]"):
        check_shapes("here", found, {**found, "weight": (5, 4)})
    (tmp_path / "b.safetensors").write_bytes(b"x")
    for name in ("b.safetensors", "none.safetensors"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            stored_shapes(tmp_path / name)


def test_a_module_on_meta_takes_no_memory() -> None:
    made = on_meta("here", lambda: nn.Linear(10**6, 10**9), most=2)
    assert made.weight.is_meta
    with pytest.raises(TooMany, match="here: asks for more than 1 tensors"):
        on_meta("here", lambda: nn.Linear(2, 2), most=1)
    with pytest.raises(ValueError, match="here: sizes that no weights can have"):
        on_meta("here", lambda: nn.Linear(10**10, 10**10), most=2)
    assert not nn.Linear(2, 2).weight.is_meta


def test_other_threads_are_not_counted() -> None:
    """The hook that counts is told of every module of the process."""

    def make() -> nn.Module:
        other = threading.Thread(target=lambda: nn.Sequential(*(nn.Linear(2, 2) for _ in range(10))))
        other.start()
        other.join()
        return nn.Linear(2, 2)

    assert torch.is_tensor(on_meta("here", make, most=2).weight)
