"""Outputs that appear whole or not at all: write beside the goal, then rename.

A rename within one folder is atomic (POSIX ``rename``), so a reader sees the old content or the new one, and
a full disk or a crash in the middle of writing leaves the old content as it was.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write into; it becomes `path` when the block ends without an error.

    Missing parent folders are made. If the block raises, all that was written or made is removed and an
    existing `path` keeps its content. With `overwrite`, the old folder is removed only after the new one is
    whole and in its place.

    Raises:
        ValueError: before the block runs, if `path` exists and `overwrite` is false, is not a folder, holds
            the working directory or the home, or if its parent cannot be written to.

    Example:
        >>> with new_folder("model") as folder:  # doctest: +SKIP
        ...     (folder / "config.json").write_text("{}")
    """
    goal = _goal(path, overwrite, folder=True)
    with _parents_of(goal):
        temporary = _sibling(goal)
        _make(temporary, folder=True)
        try:
            yield temporary
            _flush_folder(temporary)
            _put_folder(temporary, goal, overwrite)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def new_file(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield the path of an empty file to write; it becomes `path` when the block ends without an error.

    The yielded name has the suffix of `path`, because writers such as soundfile choose the format by it.

    Raises:
        ValueError: before the block runs, if `path` exists and `overwrite` is false, is a folder, or if its
            parent cannot be written to.
    """
    goal = _goal(path, overwrite, folder=False)
    with _parents_of(goal):
        temporary = _sibling(goal)
        _make(temporary, folder=False)
        try:
            yield temporary
            _flush(temporary)
            _refuse_existing(goal, overwrite)
            os.replace(temporary, goal)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def check_output(path: str | Path, overwrite: bool = False, folder: bool = True) -> None:
    """Raise what `new_folder` (or `new_file`) would raise for `path`, and leave nothing behind.

    For work that writes its output only after hours.
    """
    goal = _goal(path, overwrite, folder)
    with suppress(_Undo), _parents_of(goal):
        temporary = _sibling(goal)
        _make(temporary, folder)
        if folder:
            temporary.rmdir()
        else:
            temporary.unlink()
        raise _Undo


def holding(*names: str) -> Callable[[Path], bool]:
    """Whether a folder has one of these files: how an output of ours is known."""
    return lambda folder: any((folder / name).is_file() for name in names)


def check_apart(path: str | Path, read: Mapping[str, Any], ours: Callable[[Path], bool] | None = None) -> None:
    """Raise `ValueError` if an output would replace what is read.

    Args:
        path: of the output.
        read: what the message calls each, and where it is; what is no path is passed over.
        ours: whether a folder is such an output; one that is not, inside one that is read, is a part of that.
    """
    goal = Path(path).expanduser().resolve()
    for what, source in read.items():
        if not isinstance(source, str | Path):
            continue
        here = Path(source).expanduser().resolve()
        part = ours is not None and here in goal.parents and goal.is_dir() and not ours(goal)
        if goal == here or goal in here.parents or part:
            raise ValueError(f"output {str(path)!r} would replace {what}, which is at {str(source)!r}")


class _Undo(Exception):
    """Leaves `_parents_of` by its way out for errors."""


def _goal(path: str | Path, overwrite: bool, folder: bool) -> Path:
    if not str(path):
        raise ValueError("output: the path is empty")
    goal = Path(os.path.realpath(Path(path).expanduser()))  # through links: the link stays, its target changes
    _refuse_existing(goal, overwrite)
    if goal.exists():
        if goal.is_dir() != folder:
            kind = "file" if folder else "folder"
            raise ValueError(f"output: {path} is a {kind}; a {'folder' if folder else 'file'} is to be written")
        if folder and any(kept == goal or goal in kept.parents for kept in (Path.cwd().resolve(), Path.home())):
            raise ValueError(f"output: {path} holds the working directory or the home; it is not overwritten")
    elif goal == goal.parent:
        raise ValueError(f"output: {path} is no name for an output")
    return goal


def _refuse_existing(goal: Path, overwrite: bool) -> None:
    if not overwrite and os.path.lexists(goal):
        raise ValueError(f"output: {goal} exists; give another path, or overwrite=True to replace it")


@contextmanager
def _parents_of(goal: Path) -> Iterator[None]:
    """Make the missing parents; on error remove again those that were made here and are empty."""
    made = [folder for folder in goal.parents if not os.path.lexists(folder)]
    try:
        try:
            goal.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(goal, error) from error
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _sibling(goal: Path) -> Path:
    """A free hidden name beside `goal`: the same file system, so that the rename is one."""
    # A name may take 255 bytes; the stem is cut so that a long name leaves room for the rest.
    return goal.parent / f".{goal.stem[:40]}.{uuid.uuid4().hex}.tmp{goal.suffix}"


def _make(temporary: Path, folder: bool) -> None:
    try:
        if folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
    except OSError as error:
        raise _unwritable(temporary, error) from error


def _unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"output: cannot write into {path.parent}: {error.strerror or error}")


def _put_folder(temporary: Path, goal: Path, overwrite: bool) -> None:
    """Rename `temporary` to `goal`; a folder that is there steps aside first and comes back on error."""
    _refuse_existing(goal, overwrite)  # it may have appeared while the block ran
    if not goal.exists():
        os.rename(temporary, goal)
        return
    old = _sibling(goal)
    os.rename(goal, old)
    try:
        os.rename(temporary, goal)
    except BaseException:
        os.rename(old, goal)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(file: Path) -> None:
    """Have the system write `file` to the disk: some file systems report a full disk only now."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _flush(Path(root) / name)
