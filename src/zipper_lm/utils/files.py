"""Outputs that appear whole or not at all, and how JSON is written.

What is written goes into a hidden staging folder beside its goal first, and from there to its place by renaming, which
is atomic within one file system: a reader sees the old content or the new one, and a full disk or a crash in the middle
of writing leaves the old content as it was. A folder that is there changes places with the new one at once, where the
system can do that (Linux: `renameat2`); elsewhere there is a moment between two renames.

A staging folder is locked for as long as its process lives. What a process that was killed left behind is put back or
removed by the next one that writes to the same place.
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

_NEW, _OLD, _LOCK = "new", "old", "lock"
"""In a staging folder: what is to come, what stepped aside for it, and the file by whose lock its process is alive."""
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

    What `path` holds under other names stays. Where a file is replaced, a folder with all files, old and new, takes the
    place of `path` at once, if the system can do that. Else `last` comes after the others, so that a reader who starts
    from it never sees it without the rest, and an error on the way puts all back as it was.

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
        written = [path.relative_to(new) for path in new.rglob("*") if not path.is_dir()]
        names = sorted(written, key=lambda name: (str(name) == last, name))
        there = [str(name) for name in names if os.path.lexists(folder / name)]
        if there and not overwrite:
            raise ValueError(f"{folder} already holds {there}; pass overwrite=True to replace them")
        if not (there and _exchange_with(staging, folder, names)):
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
        if folder and _holds_somebody(goal):
            raise ValueError(f"output: {path} holds the working directory or the home; it is not overwritten")
    elif goal == goal.parent:
        raise ValueError(f"output: {path} is no name for an output")
    return goal


def _holds_somebody(folder: Path) -> bool:
    """Whether the working directory or the home is in a folder, or is that folder."""
    return any(kept == folder or folder in kept.parents for kept in (Path.cwd().resolve(), Path.home()))


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
            raise _unwritable(goal.parent, error) from error
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder`, with a folder ``new`` inside it; removed in the end, with all that is left in it.

    Raises:
        ValueError: if it cannot be made.
    """
    nested = _is_nested(folder)  # then the outer one is locked, and swept as a whole
    if not nested:
        _sweep(folder)
    try:
        staging, lock = _made(folder, locked=not nested)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        with tell_full_disk(folder):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        lock.release()


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
    except Timeout:
        return False
    except (OSError, NotImplementedError):
        return True
    if not os.path.exists(lock.lock_file):
        lock.release()
        return False
    return True


def _sweep(folder: Path) -> None:
    """Remove the staging folders of processes that are gone, and put back what they had moved aside."""
    try:
        names = os.listdir(folder)
    except OSError:  # whoever writes there next says so
        return
    for name in names:
        if (found := _STAGING.fullmatch(name)) is None:
            continue
        staging = folder / name
        abandoned = time.time() - _last_change(staging) >= _ABANDONED_SECONDS
        if not abandoned and not ((staging / _LOCK).exists() and found["host"] == _host()):
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
                _put_back(staging, folder)
                shutil.rmtree(staging, ignore_errors=True)
        finally:
            lock.release()


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _last_change(folder: Path) -> float:
    """When anything in a folder was last changed, in seconds since 1970; now, if that cannot be known."""
    try:
        return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return time.time()


def _exchange(one: Path, other: Path) -> bool:
    """Have two paths change places at once; whether the system could do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and (
        rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
    )


def _exchange_with(staging: Path, folder: Path, names: Sequence[Path]) -> bool:
    """Put a folder in the place of `folder` that holds what is new and, as links, all else that is there; whether that
    could be done."""
    here = Path(os.path.realpath(folder))
    others = any(_STAGING.fullmatch(name) and name != staging.name for name in os.listdir(here))
    fixed = os.path.ismount(here) or here.stat().st_uid != os.geteuid() or _holds_somebody(here)
    if others or fixed or _is_nested(here):
        return False
    new = staging / _NEW
    try:
        with _staging(here.parent) as beside:
            (beside / _OLD).mkdir()
            if not _exchange(beside / _NEW, beside / _OLD):
                return False
            whole = beside / _NEW / here.name
            try:
                shutil.copytree(here, whole, symlinks=True, copy_function=os.link, ignore=lambda *_: {staging.name})
            except OSError:  # a file system without links
                return False
            for name in names:
                (whole / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(new / name, whole / name)
            if _exchange(whole, here):
                return True
            for name in names:
                os.replace(whole / name, new / name)
            return False
    except ValueError:  # the folder around it cannot be written to
        return False


def _move_in(staging: Path, folder: Path, names: Sequence[Path]) -> None:
    """Rename what is new into `folder`, in this order; what is in its way steps aside. On error all is as it was."""
    new, old = staging / _NEW, staging / _OLD
    try:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(folder / name):
                (old / name).parent.mkdir(parents=True, exist_ok=True)
                _set_aside(folder / name, old / name)
            os.replace(new / name, folder / name)
    except BaseException:
        for name in names:
            if not os.path.lexists(new / name):
                os.rename(folder / name, new / name)
        _put_back(staging, folder)
        for parent in sorted({parent for name in names for parent in name.parents}, reverse=True):
            with suppress(OSError):  # that were there before, or hold something
                (folder / parent).rmdir()
        raise


def _set_aside(path: Path, aside: Path) -> None:
    """Keep a file, or a folder, under a second name; a file keeps the first one too, where there are links."""
    try:
        os.link(path, aside, follow_symlinks=False)
    except (OSError, NotImplementedError):
        os.rename(path, aside)


def _put_back(staging: Path, folder: Path) -> None:
    """Move what had stepped aside back, unless all that was to come has taken its place."""
    old = staging / _OLD
    unfinished = any(not path.is_dir() for path in (staging / _NEW).rglob("*"))
    for entry in list(old.iterdir()) if old.is_dir() else []:
        if not os.path.lexists(folder / entry.name):
            os.rename(entry, folder / entry.name)
    if unfinished:
        for file in [path for path in old.rglob("*") if not path.is_dir()]:
            os.replace(file, folder / file.relative_to(old))


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
