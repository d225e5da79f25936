"""A full disk is told as one, and where, whatever library met it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class DiskFull(OSError):
    """No space, or no quota, is left where something is to be written."""


@contextmanager
def tell_full_disk(folder: Path) -> Iterator[None]:
    """An error in the block that comes of a full disk becomes one that says so, and where: libraries that write with
    other means than Python's raise errors of their own, and some do not know why they failed.

    Raises:
        DiskFull: then.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if is_disk_full(error) or (isinstance(error, RuntimeError) and not _has_space(folder)):
            raise DiskFull(f"{os.strerror(errno.ENOSPC)} where {folder} is: free some and run it again") from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says, by itself or by what it comes of, that no space is left on a disk."""
    told: BaseException | None = error
    while told is not None:
        if isinstance(told, OSError) and told.errno in _NO_SPACE:
            return True
        if isinstance(told, DiskFull) or any(os.strerror(number) in str(told) for number in _NO_SPACE):
            return True
        told = told.__cause__ or told.__context__
    return False


def _has_space(folder: Path) -> bool:
    """Whether something can be written into a folder still."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno not in _NO_SPACE
    return True
