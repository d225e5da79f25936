"""Outputs that appear whole or not at all, and how JSON is written.

What is written goes into a hidden staging folder beside its goal first, and from there to its place by renaming, which
is atomic within one file system: a reader sees the old content or the new one, and a full disk or a crash in the middle
of writing leaves the old content as it was. A folder that is replaced changes places with the new one at once, where
the system can do that (Linux: `renameat2`); elsewhere there is a moment between two renames. A folder that files join
stays the same folder, because others may write there too.

A staging folder is locked for as long as its process lives. What a process that was killed left behind is put back or
removed by the next one that writes to the same place. What others have saved there since is never touched.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from zipper_lm.utils.disk import tell_full_disk

_NEW, _OLD, _ADDED, _GONE, _LOCK = "new", "old", "added", "gone", "lock"
"""In a staging folder: what is to come, what stepped aside for it, empty files with the names of what was not there
before, what is being removed, and the file by whose lock its process is alive."""
_STAGING = re.compile(r"\.writing-(?P<host>[0-9a-f]{8})-[0-9a-f]{32}")
_ABANDONED_SECONDS = 24 * 3600
"""A staging folder in which nothing has changed for so long is nobody's. On network file systems a lock may not reach
other hosts, or there is none: there it is this that counts."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def as_json(content: Any, indent: int | None = None) -> str:
    """JSON text, ASCII, of plain values and of numbers of numpy and torch. NaN and infinities, for which JSON has no
    numbers, become null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def write_json(file: Path, content: Any) -> None:
    """Write `as_json` into a file that one of the functions below gave, or that is in a folder of theirs."""
    file.write_text(as_json(content, indent=2) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if not isinstance(value, str | int) and hasattr(value, "item"):  # of numpy or torch
        return _finite(value.item())
    return value


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
    with _parents_of(goal), _staging(goal.parent) as staging:
        folder = staging / _NEW / goal.name
        folder.mkdir()
        yield folder
        _flush_folder(folder)
        _refuse_existing(goal, overwrite)  # it may have appeared while the block ran
        if not goal.exists():
            os.rename(folder, goal)
        elif not _exchange(folder, goal):
            _move_in(staging, goal.parent, [Path(goal.name)])


@contextmanager
def files_into(path: str | Path, last: str, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty folder to write into; its files join the folder `path` when the block ends without an error.

    What `path` holds under other names stays. An old `last` goes before the others come, and the new one comes after
    them, so that a reader who starts from it sees all that is old, all that is new, or for a moment nothing. An error
    on the way puts all back as it was.

    Args:
        path: made if missing, with its parents. last: name of a file. overwrite: replace files of the same names.

    Raises:
        ValueError: if `path` is a file or cannot be written to, or holds a file of a name that was written, and
            `overwrite` is false.
    """
    folder = Path(path)
    with _parents_of(folder / last), _staging(folder) as staging:
        new = staging / _NEW
        yield new
        _flush_folder(new)
        names = sorted(_files(new), key=lambda name: (str(name) == last, name))
        there = [str(name) for name in names if os.path.lexists(folder / name)]
        if there and not overwrite:
            raise ValueError(f"{folder} already holds {there}; pass overwrite=True to replace them")
        _move_in(staging, folder, names)


@contextmanager
def new_file(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield the path of an empty file to write; it becomes `path` when the block ends without an error.

    The yielded name is that of `path`, because writers such as soundfile choose the format by its suffix.

    Raises:
        ValueError: before the block runs, if `path` exists and `overwrite` is false, is a folder, or if its
            parent cannot be written to.
    """
    goal = _goal(path, overwrite, folder=False)
    with _parents_of(goal), _staging(goal.parent) as staging:
        file = staging / _NEW / goal.name
        file.touch()
        yield file
        _flush(file)
        _refuse_existing(goal, overwrite)
        os.replace(file, goal)


def check_output(path: str | Path, overwrite: bool = False, folder: bool = True) -> None:
    """Raise what `new_folder` (or `new_file`) would raise for `path`, and leave nothing behind.

    For work that writes its output only after hours.
    """
    goal = _goal(path, overwrite, folder)
    with suppress(_Undo), _parents_of(goal), _staging(goal.parent):
        raise _Undo


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there, in one moment: whoever is killed meanwhile leaves it whole, or what the next one
    that writes beside it removes."""
    if not folder.exists():
        return
    try:
        with _staging(folder.parent) as staging:
            os.rename(folder, staging / _GONE)
    except (OSError, ValueError):  # moved by another process, or its parent cannot be written to
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_checkpoint(folder: Path, last: str, *, alone: bool = True) -> Iterator[None]:
    """For a folder that a library writes, file by file and `last` at the end: if the block raises before that, what it
    wrote is removed.

    Args:
        folder: the library's. last: name of the file. alone: false leaves a folder that others write too to them.

    Raises:
        DiskFull: as `tell_full_disk`.
    """
    try:
        with tell_full_disk(folder.parent):
            yield
    except BaseException:
        if alone and not (folder / last).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


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
        raise ValueError(
            f"output: {goal} exists; give another path, or replace it: --overwrite (in Python overwrite=True)"
        )


@contextmanager
def _parents_of(goal: Path) -> Iterator[None]:
    """Make the missing parents; on error remove again those that were made here and are empty."""
    made = [folder for folder in goal.parents if not os.path.lexists(folder)]
    try:
        try:
            goal.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(goal.parent, error) from error
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder`, with a folder ``new`` inside it; removed in the end, with all that is left in it,
    unless that is what stepped aside for something that has not come.

    Raises:
        ValueError: if it cannot be made.
    """
    nested = _is_nested(folder)  # then the outer one is locked, and swept as a whole
    if not nested:
        sweep(folder)
    try:
        staging, lock = _made(folder, locked=not nested)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        with tell_full_disk(folder):
            yield staging
    finally:
        if not (_files(staging / _NEW) and _files(staging / _OLD)):  # else it could not be undone: the next one tries
            _clear(staging)
        lock.release()


def _clear(staging: Path) -> None:
    """Remove a staging folder, its lock last: without one it would be nobody's for a day, if this was cut off."""
    with suppress(OSError):
        for path in staging.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)


def _is_nested(folder: Path) -> bool:
    return any(_STAGING.fullmatch(part) for part in folder.absolute().parts)


def _made(folder: Path, locked: bool) -> tuple[Path, FileLock]:
    """A new staging folder and its lock. Another process may take it for one that was left, in the moment before it is
    locked; then there is another one."""
    while True:
        staging = folder / f".writing-{_host()}-{uuid.uuid4().hex}"
        staging.mkdir()
        lock = FileLock(staging / _LOCK)
        if locked and not _lock(lock):
            continue
        try:
            (staging / _NEW).mkdir()
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            lock.release()
            raise
        return staging, lock


def _lock(lock: FileLock) -> bool:
    """Take a new folder's lock; whether the folder is still ours. Some file systems have no locks: it goes without."""
    try:
        lock.acquire(blocking=False)
    except (Timeout, FileNotFoundError):  # somebody has it, or has removed it while it was empty
        return False
    except (OSError, NotImplementedError):
        return True
    if not os.path.exists(lock.lock_file):
        lock.release()
        return False
    return True


def sweep(folder: Path) -> None:
    """Remove the staging folders of processes that are gone, and put back what they had moved aside.

    Whatever is written into a folder does so first. It is to be called where nothing may be written any more, as into
    the folder of a cache that has all."""
    try:
        names = os.listdir(folder)
    except OSError:  # whoever writes there next says so
        return
    for name in names:
        if (found := _STAGING.fullmatch(name)) is None:
            continue
        staging, own = folder / name, found["host"] == _host()
        changed = _last_change(staging)
        abandoned = time.time() - changed >= _ABANDONED_SECONDS
        if not abandoned and not ((staging / _LOCK).exists() and own):
            if own:
                with suppress(OSError):  # not empty, or gone; who has just made it makes it again with its lock
                    staging.rmdir()
            continue
        lock = FileLock(staging / _LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        except (OSError, NotImplementedError):  # no locks here
            if not abandoned:
                continue
        try:
            with suppress(OSError):
                _recover(staging, folder, changed)
                _clear(staging)
        finally:
            lock.release()


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _last_change(staging: Path) -> float:
    """When its process last changed anything in a staging folder, in seconds since 1970; now, if that cannot be known.
    The lock does not count, nor the folder that it is in: whoever tries the lock changes them."""
    try:
        paths = [path for path in staging.rglob("*") if path != staging / _LOCK]
        return max(path.lstat().st_mtime for path in paths or [staging])
    except OSError:
        return time.time()


def _exchange(one: Path, other: Path) -> bool:
    """Have two paths change places at once; whether the system could do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and (
        rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
    )


def _files(folder: Path) -> list[Path]:
    """What is no folder in a folder and those inside it, by its path from there; nothing if there is no such folder."""
    return [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]


def _move_in(staging: Path, folder: Path, names: Sequence[Path]) -> None:
    """Rename what is new into `folder`, in this order; what is in its way steps aside. On error all is as it was.

    Of several, the last is what readers start from: there is none while the others are half old and half new."""
    new, old = staging / _NEW, staging / _OLD
    try:
        for name in names:
            if not os.path.lexists(folder / name):
                (staging / _ADDED / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / _ADDED / name).touch()
        for name in names[-1:] if len(names) > 1 else []:
            _set_aside(folder / name, old / name, stays=False)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _set_aside(folder / name, old / name, stays=True)
            os.replace(new / name, folder / name)
    except BaseException:
        for name in reversed(names):
            if not os.path.lexists(new / name):
                os.rename(folder / name, new / name)
        _put_back(staging, folder)
        for parent in sorted({parent for name in names for parent in name.parents}, reverse=True):
            with suppress(OSError):  # that were there before, or hold something
                (folder / parent).rmdir()
        raise


def _set_aside(path: Path, aside: Path, stays: bool) -> None:
    """Keep a file, or a folder, if there is one, under a second name. Where there are links, a file that `stays` keeps
    the first one too."""
    if not os.path.lexists(path):
        return
    aside.parent.mkdir(parents=True, exist_ok=True)
    if stays:
        with suppress(OSError, NotImplementedError):
            os.link(path, aside, follow_symlinks=False)
            return
    os.rename(path, aside)


def _put_back(staging: Path, folder: Path, replace: bool = True) -> None:
    """Move what had stepped aside back, unless all that was to come has taken its place; without `replace`, only what
    is missing there. What is missing comes last, since readers start from it."""
    old = staging / _OLD
    for name in _files(old) if replace and _files(staging / _NEW) else []:
        place = folder / name
        if os.path.lexists(place) and os.path.samestat(place.lstat(), (old / name).lstat()):
            (old / name).unlink()  # it has kept its place
        elif os.path.lexists(folder / name.parts[0]):
            os.replace(old / name, place)
    for entry in list(old.iterdir()) if old.is_dir() else []:
        if not os.path.lexists(folder / entry.name):
            os.rename(entry, folder / entry.name)


def _recover(staging: Path, folder: Path, since: float) -> None:
    """Undo what a process that is gone had not finished. Where somebody has put a file of these names since its last
    change, nothing is replaced or removed: what they saved counts, and what had stepped aside is older."""
    places = {folder / name for part in (_NEW, _OLD, _ADDED) for name in _files(staging / part)}
    # The time of the inode, not of the content: a copy that keeps its times is put there too.
    alone = not any(place.lstat().st_ctime > since for place in places if os.path.lexists(place))
    for name in _files(staging / _ADDED) if alone and _files(staging / _NEW) else []:
        (folder / name).unlink(missing_ok=True)
    _put_back(staging, folder, replace=alone)


def _unwritable(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"output: cannot write to {folder}: {error.strerror or error}")


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
