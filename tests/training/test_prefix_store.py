"""States of streams, kept by a hash of their ids."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from zipper_lm.training.prefix_store import (
    LIMIT_NAME,
    PrefixStore,
    files_limit,
    key_of,
    make_room,
    mark_used,
    write_states,
)


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


def test_room_is_made_by_what_was_not_used_for_longest(tmp_path: Path) -> None:
    """Nothing deleted a file of states: each tower that was trained around left its own, for ever."""
    files = [
        write_states(tmp_path / f"text-{tower:016x}", "a" * 64, [key_of([number])], [9], torch.zeros(9, 2, 3))
        for tower in range(2)
        for number in range(3)
    ]
    others = [tmp_path / "text-mine" / files[0].name, tmp_path / files[0].parent.name / "model.safetensors"]
    others[0].parent.mkdir()
    size, day = files[0].stat().st_size, 24 * 3600
    for other in others:
        other.write_bytes(bytes(size))
    for age, file in zip([9, 3, 8, 7, 6, 0.5], [*files, *others]):
        os.utime(file, (time.time() - age * day,) * 2)
    assert make_room(tmp_path, 0, 6 * size) == 0
    assert make_room(tmp_path, size, 6 * size) == size
    assert [file.exists() for file in files] == [False, True, True, True, True, True]
    mark_used(files[2])
    assert make_room(tmp_path, 0, 4 * size) == size
    assert [file.exists() for file in files] == [False, True, True, False, True, True]
    assert make_room(tmp_path, 0, 0) == 2 * size
    assert [file.exists() for file in files] == [False, False, True, False, False, True], "used within a day"
    assert all(other.exists() for other in others), "what others put there"
    os.utime(files[5], (0, 0))
    make_room(tmp_path, 0, 0)
    assert not files[5].parent.exists()
    assert files[0].parent.exists()


def test_a_limit_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIMIT_NAME, raising=False)
    assert files_limit() == 50 * 2**30
    monkeypatch.setenv(LIMIT_NAME, "0.5")
    assert files_limit() == 2**29
    for wrong in ("-1", "many", "nan"):
        monkeypatch.setenv(LIMIT_NAME, wrong)
        with pytest.raises(ValueError, match=f"ZIPPER_PREFIXES_GIB must be a number of GiB from 0 on, got '{wrong}'"):
            files_limit()
