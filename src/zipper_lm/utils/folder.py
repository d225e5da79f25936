"""Write the files of a folder together: all of them appear, or none does."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def files_into(path: str | Path, last: str) -> Iterator[Path]:
    """Give a temporary folder; when the block ends without error, move its files into the folder `path`.

    What `path` already holds under other names stays. `last` is moved after the others, so a reader that starts from it
    never sees it without the rest.

    Raises:
        ValueError: if `path` is a file or cannot be made.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file, a folder is needed")
    try:
        path.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path, prefix=".writing-"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error})") from error
    try:
        yield temporary
        for file in sorted(temporary.iterdir(), key=lambda f: (f.name == last, f.name)):
            goal = path / file.name
            if goal.is_dir():  # a folder cannot be replaced by renaming: the old one steps aside
                os.replace(goal, temporary / f".{file.name}.old")
            os.replace(file, goal)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
