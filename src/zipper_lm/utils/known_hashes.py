"""Hashes of what was read from files, remembered for as long as the files stay as they are.

A file is known by its path, inode, size and times, as version control knows one. What was written within the last
moments is not remembered: it could change once more without another time. A remembered hash only ever confirms the one
that is expected; where it does not, it is computed.

They are in ``hashes.json`` of the cache folder. It may be deleted at any time, and whatever is wrong with it is passed
over.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from zipper_lm.utils.files import as_json, new_file, write_json
from zipper_lm.utils.json_files import read_mapping
from zipper_lm.utils.places import cache_folder

FORMAT = 1
"""Of the file, and of all that hashes are computed by: to be raised when one of these gives others."""

MOST = 1000
"""Hashes that are remembered; those that were computed last."""

FRESH = 2.0
"""Seconds for which a file is too new: the coarsest times that file systems keep."""

PATIENCE = 5.0
"""Seconds in which another process may write, before it is given up."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


class FilesSeen:
    """Files as they are before they are read.

    Args:
        files: all that are read. None: nothing is remembered.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self._states = _states(self.files)

    def hash(self, how: Any, expected: str | None, compute: Callable[[], str]) -> str:
        """The SHA-256 of what was read from the files: that which is expected, if it is remembered, else computed.

        Args:
            how: all besides the files that decides what was read, a JSON value. expected: as hex. compute: gives it.
        """
        key = hashlib.sha256(as_json([self._states, how]).encode()).hexdigest()
        file = cache_folder() / "hashes.json"
        if expected is not None and self._unchanged() and _remembered(file).get(key) == expected:
            return expected
        found = compute()
        if self._unchanged():
            _remember(file, key, found)
        return found

    def _unchanged(self) -> bool:
        return self._states is not None and self._states == _states(self.files)


def _states(files: Iterable[Path]) -> list[list[Any]] | None:
    """What is known of each; `None` if there is none, or one is missing or too new."""
    states: list[list[Any]] = []
    try:
        for file in files:
            path = os.path.realpath(file)
            told = os.stat(path)
            # The time of the inode, too: content can be replaced with the other time kept.
            if time.time() - max(told.st_mtime, told.st_ctime) < FRESH:
                return None
            states.append([path, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns])
    except OSError:
        return None
    return states or None


def _remembered(file: Path) -> dict[str, str]:
    try:
        told = read_mapping(file)
    except ValueError:
        return {}
    hashes = told.get("hashes")
    if told.get("format") != FORMAT or not isinstance(hashes, dict):
        return {}
    return {k: v for k, v in hashes.items() if isinstance(v, str) and _SHA256.fullmatch(k) and _SHA256.fullmatch(v)}


def _remember(file: Path, key: str, found: str) -> None:
    """Add a hash; where the file cannot be written, or is being written for long, it is done without."""
    with suppress(OSError, ValueError, NotImplementedError):
        locks = file.parent / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / "hashes.lock", timeout=PATIENCE):
            hashes = _remembered(file)
            hashes.pop(key, None)
            kept = dict([*hashes.items(), (key, found)][-MOST:])
            with new_file(file, overwrite=True) as new:
                write_json(new, {"format": FORMAT, "hashes": kept})
