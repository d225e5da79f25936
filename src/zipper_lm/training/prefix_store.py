"""States of a frozen tower's prefix, in memory or in files that are mapped into it.

A file is whole or not there, and says of itself which tower and layers it is of, and which streams: so files that
others made, or an interrupted run, are read again, and what they lack is added as further files. Their tensors:
``states`` ``[tokens, kept, hidden]``, ``keys`` uint8 ``[streams, 16]``, ``lengths`` int64 ``[streams]``. A file's time
is that of its last use: where there are too many, those go first that were not used for the longest time.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zipper_lm.utils.files import new_file
from zipper_lm.utils.tensors import dtype_name

LIMIT_NAME, LIMIT_GIB = "ZIPPER_PREFIXES_GIB", 50.0
"""The environment variable that says how much all files together may take, and what holds without it."""

USED_SECONDS = 24 * 3600.0
"""What was used within that time stays: others may be reading it."""

_OURS, _PLACE = re.compile(r"[0-9a-f]{32}\.safetensors"), re.compile(r".+-[0-9a-f]{16}")
"""What our files are called, and the folder of a tower: others are left alone."""

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
            FileNotFoundError: if it is gone. ValueError: naming it, if it is damaged, or not of this tower and layers.
        """
        again = "delete it, and it is made anew"
        try:
            with safe_open(file, framework="pt") as stored:
                told = dict(stored.metadata() or {})
                states, keys, lengths = (stored.get_tensor(name) for name in ("states", "keys", "lengths"))
        except FileNotFoundError:
            raise
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
    assert _OURS.fullmatch(file.name)
    tensors: dict[str, Any] = {
        "states": states,
        "keys": torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES).copy()),
        "lengths": torch.tensor(list(lengths), dtype=torch.int64),
    }
    with new_file(file, overwrite=True) as new:
        save_file(tensors, new, metadata=_told(fingerprint))
    return file


def files_limit() -> float:
    """Bytes that all files of states together may take.

    Raises:
        ValueError: naming the environment variable, if that is no number of GiB.
    """
    given = os.environ.get(LIMIT_NAME) or str(LIMIT_GIB)
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise ValueError(f"{LIMIT_NAME} must be a number of GiB from 0 on, got {given!r}")
    return limit * 2**30


def mark_used(file: Path) -> None:
    """Make this moment the time of a file."""
    with suppress(OSError):  # another's, which can be read all the same
        os.utime(file)


def make_room(folder: Path, coming: int, limit: float) -> int:
    """Delete files of states until there is room for others, those first that were not used for the longest time; but
    none that was used just now.

    Args:
        folder: of the folders of all towers; files of other names in it are left alone. coming: bytes that will be
            written. limit: bytes that there may be then.

    Returns:
        Bytes that were deleted.
    """
    found = []
    for file in folder.glob("*/*.safetensors"):
        if _OURS.fullmatch(file.name) and _PLACE.fullmatch(file.parent.name):
            with suppress(OSError):  # gone meanwhile
                told = file.stat()
                found.append((told.st_mtime, told.st_size, file))
    over, deleted = coming + sum(size for _, size, _ in found) - limit, 0
    for used, size, file in sorted(found):
        if deleted >= over or time.time() - used < USED_SECONDS:
            break
        with suppress(OSError):  # it may be open elsewhere, where that keeps it
            file.unlink()
            deleted += size
            file.parent.rmdir()
    return deleted


def _told(fingerprint: str) -> dict[str, str]:
    return {"format": FORMAT, "of": fingerprint}
