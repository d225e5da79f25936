"""States of streams, kept by a hash of their ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zipper_lm.training.prefix_store import PrefixStore, key_of, write_states


def test_a_stream_is_found_by_its_ids() -> None:
    store = PrefixStore(2, 3, torch.float32)
    states = torch.arange(30.0).reshape(5, 2, 3)
    store.add([key_of([1, 2]), key_of([3, 4, 5])], [2, 3], states)
    found = store.of(key_of([3, 4, 5]))
    assert found is not None
    assert torch.equal(found, states[2:])
    assert store.of(key_of([1])) is None
    assert len(store) == 2


def test_a_file_is_of_one_tower_and_holds_what_was_written(tmp_path: Path) -> None:
    states, keys = torch.arange(30.0).reshape(5, 2, 3), [key_of([1, 2]), key_of([3, 4, 5])]
    file = write_states(tmp_path / "new", "a" * 64, keys, [2, 3], states)
    assert file == write_states(tmp_path / "new", "a" * 64, keys, [2, 3], states), "the name says which streams"
    store = PrefixStore(2, 3, torch.float32)
    assert store.read(file, "a" * 64) == keys
    found = store.of(keys[0])
    assert found is not None
    assert torch.equal(found, states[:2])
    for other, of in ((store, "b" * 64), (PrefixStore(3, 2, torch.float32), "a" * 64)):
        with pytest.raises(ValueError, match=f"{file.name}: .*delete it"):
            other.read(file, of)
    with pytest.raises(ValueError, match="wanted are 2 states of 3 bfloat16"):
        PrefixStore(2, 3, torch.bfloat16).read(file, "a" * 64)
