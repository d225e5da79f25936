"""States of a frozen tower's prefix, in memory or in files that are mapped into it.

A file is whole or not there, and says of itself which tower and layers it is of, and which streams: so files that
others made, or an interrupted run, are read again, and what they lack is added as further files. Their tensors:
``states`` ``[tokens, kept, hidden]``, ``keys`` uint8 ``[streams, 16]``, ``lengths`` int64 ``[streams]``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zipper_lm.utils.files import new_file
from zipper_lm.utils.tensors import dtype_name

KEY_BYTES = 16
FORMAT = "zipper prefix states 1"


def key_of(ids: Sequence[int] | np.ndarray) -> bytes:
    """What a stream is known by: a hash of its ids."""
    return hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=KEY_BYTES).digest()


class PrefixStore:
    """The states of one tower, by stream.

    Args:
        kept, width: sizes of a token's states. dtype: of them.
    """

    def __init__(self, kept: int, width: int, dtype: torch.dtype) -> None:
        self.kept, self.width, self.dtype = kept, width, dtype
        self._states: list[Tensor] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}  # which tensor, and from which token to which

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def add(self, keys: Sequence[bytes], lengths: Sequence[int], states: Tensor) -> None:
        """Further streams, one behind the other; states ``[tokens, kept, hidden]``."""
        number, start = len(self._states), 0
        self._states.append(states)
        for key, length in zip(keys, lengths, strict=True):
            self._places[key] = (number, start, start + length)
            start += length
        assert start == len(states)

    def of(self, key: bytes) -> Tensor | None:
        """A stream's states, ``[time, kept, hidden]``, or `None`."""
        if (place := self._places.get(key)) is None:
            return None
        number, start, end = place
        return self._states[number][start:end]

    def read(self, file: Path, fingerprint: str) -> list[bytes]:
        """Add the streams of a file, whose states stay there; their keys, from the longest to the shortest as written.

        Raises:
            ValueError: naming the file, if it is damaged, or not of this tower and layers.
        """
        again = "delete it, and it is made anew"
        try:
            with safe_open(file, framework="pt") as stored:
                told = dict(stored.metadata() or {})
                states, keys, lengths = (stored.get_tensor(name) for name in ("states", "keys", "lengths"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cannot be read: damaged ({error}); {again}") from error
        if told != _told(fingerprint):
            raise ValueError(f"{file}: holds no states of this tower's layers; {again}")
        fitting = (
            states.dtype == self.dtype
            and tuple(states.shape[1:]) == (self.kept, self.width)
            and keys.dtype == torch.uint8
            and lengths.dtype == torch.int64
            and tuple(keys.shape) == (len(lengths), KEY_BYTES)
            and bool((lengths > 0).all())
            and int(lengths.sum()) == len(states)
        )
        if not fitting:
            raise ValueError(
                f"{file}: states {list(states.shape)} {dtype_name(states.dtype)} of {len(lengths)} streams: wanted are "
                f"{self.kept} states of {self.width} {dtype_name(self.dtype)} for every token; {again}"
            )
        named, counts = [bytes(row) for row in keys.numpy()], lengths.tolist()
        self.add(named, counts, states)
        return named


def write_states(folder: Path, fingerprint: str, keys: Sequence[bytes], lengths: Sequence[int], states: Tensor) -> Path:
    """A file of streams in a folder, whole or not at all; its name says which streams.

    Args:
        folder: made if missing. fingerprint: of tower and layers. keys, lengths, states: as of `PrefixStore.add`.
    """
    file = folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.safetensors"
    tensors: dict[str, Any] = {
        "states": states,
        "keys": torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES).copy()),
        "lengths": torch.tensor(list(lengths), dtype=torch.int64),
    }
    with new_file(file, overwrite=True) as new:
        save_file(tensors, new, metadata=_told(fingerprint))
    return file


def _told(fingerprint: str) -> dict[str, str]:
    return {"format": FORMAT, "of": fingerprint}
