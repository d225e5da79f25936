"""Outputs are written whole or not at all."""

import errno
import json
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from zipper_lm.utils import disk, files
from zipper_lm.utils.disk import DiskFull
from zipper_lm.utils.files import (
    as_json,
    check_output,
    files_into,
    new_file,
    new_folder,
    remove_folder,
    sweep,
    whole_checkpoint,
    write_json,
)


def fill_up(_: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_then_raise(file: Path, error: BaseException) -> None:
    file.write_text("half")
    raise error


def test_folder_appears_only_when_whole(tmp_path):
    goal = tmp_path / "a" / "b" / "model"
    with new_folder(goal) as folder:
        assert folder.stat().st_dev == goal.parent.stat().st_dev
        assert not goal.exists()
        (folder / "config.json").write_text("{}")
    assert (goal / "config.json").read_text() == "{}"
    assert os.listdir(goal.parent) == ["model"]


def test_folder_has_the_rights_of_any_new_folder(tmp_path):
    (tmp_path / "plain").mkdir()
    with new_folder(tmp_path / "ours"):
        pass
    rights = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")]
    assert rights[0] == rights[1]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_error_in_the_middle_leaves_the_old_folder_whole(tmp_path, error):
    goal = tmp_path / "model"
    goal.mkdir()
    (goal / "config.json").write_text("old")
    with pytest.raises(type(error)), new_folder(goal, overwrite=True) as folder:
        write_then_raise(folder / "config.json", error)
    assert os.listdir(tmp_path) == ["model"]
    assert (goal / "config.json").read_text() == "old"
    assert os.listdir(goal) == ["config.json"]


def test_disk_full_on_flush_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    goal = tmp_path / "model"
    with new_folder(goal) as folder:
        (folder / "a").write_text("old")
    monkeypatch.setattr(files, "_flush", fill_up)
    with pytest.raises(OSError, match="No space"), new_folder(goal, overwrite=True) as folder:
        (folder / "a").write_text("new")
    assert (goal / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_failed_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    goal = tmp_path / "model"
    goal.mkdir()
    (goal / "a").write_text("old")
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    monkeypatch.setattr(files.os, "rename", second_fails)
    monkeypatch.setattr(files.os, "replace", second_fails)
    with pytest.raises(OSError, match="Input/output"), new_folder(goal, overwrite=True) as folder:
        (folder / "a").write_text("new")
    assert (goal / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_old_folder_goes_only_after_the_new_one_is_whole(tmp_path):
    goal = tmp_path / "model"
    goal.mkdir()
    (goal / "left-over").write_text("old")
    with new_folder(goal, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert (goal / "left-over").exists()
    assert os.listdir(goal) == ["config.json"]
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("writer", [new_folder, new_file])
def test_existing_output_is_refused(tmp_path, writer):
    goal = tmp_path / "out"
    goal.mkdir() if writer is new_folder else goal.write_text("old")
    with pytest.raises(ValueError, match=r"output: .*out exists.*overwrite"), writer(goal):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("writer", [new_folder, new_file])
def test_output_that_appears_meanwhile_is_kept(tmp_path, writer):
    goal = tmp_path / "out"
    with pytest.raises(ValueError, match="exists"), writer(goal):
        goal.mkdir() if writer is new_folder else goal.write_text("theirs")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("writer", [new_folder, new_file])
def test_unwritable_parent_is_refused_before_work(tmp_path, writer):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"output: cannot write to .*file"),
        writer(tmp_path / "file" / "out"),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("writer", [new_folder, new_file])
def test_refused_permission_is_a_value_error_and_leaves_no_parents(tmp_path, monkeypatch, writer):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    parent = tmp_path / "closed"
    parent.mkdir()
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match="Permission denied"), writer(parent / "out"):
        pytest.fail("the block must not run")
    monkeypatch.undo()
    assert os.listdir(parent) == []


def test_kind_mismatch_is_refused(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="is a file"), new_folder(tmp_path / "file", overwrite=True):
        pass
    with pytest.raises(ValueError, match="is a folder"), new_file(tmp_path / "folder", overwrite=True):
        pass
    assert (tmp_path / "file").read_text() == "old"


def test_working_directory_is_never_overwritten(tmp_path, monkeypatch):
    inside = tmp_path / "project" / "src"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    with (
        pytest.raises(ValueError, match="working directory"),
        new_folder(tmp_path / "project", overwrite=True),
    ):
        pass
    assert inside.is_dir()


def test_file_is_replaced_whole_and_keeps_its_suffix(tmp_path):
    goal = tmp_path / "out.wav"
    goal.write_text("old")
    with new_file(goal, overwrite=True) as file:
        assert file.suffix == ".wav"
        file.write_text("new")
        assert goal.read_text() == "old"
    assert goal.read_text() == "new"
    assert os.listdir(tmp_path) == ["out.wav"]


def test_disk_full_while_writing_a_file(tmp_path):
    goal = tmp_path / "made" / "out.json"
    with pytest.raises(OSError, match="No space"), new_file(goal) as file:
        write_then_raise(file, OSError(errno.ENOSPC, "No space left on device"))
    assert os.listdir(tmp_path) == []


def test_link_stays_and_its_target_changes(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "new"


@pytest.mark.parametrize("folder", [True, False])
def test_check_output_leaves_nothing(tmp_path, folder):
    check_output(tmp_path / "a" / "b", folder=folder)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        check_output(tmp_path / "file" / "x", folder=folder)
    with pytest.raises(ValueError, match="exists"):
        check_output(tmp_path / "file", folder=folder)


def test_files_join_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("mine", "sub/mine", "old", "sub/old"):
        (tmp_path / name).write_text("before")
    with files_into(tmp_path, last="last") as folder:
        (folder / "sub").mkdir()
        for name in ("last", "old", "sub/old", "sub/new"):
            (folder / name).write_text("after")
        assert (tmp_path / "old").read_text() == "before"
    assert {str(f.relative_to(tmp_path)): f.read_text() for f in tmp_path.rglob("*") if f.is_file()} == {
        **dict.fromkeys(("mine", "sub/mine"), "before"),
        **dict.fromkeys(("last", "old", "sub/old", "sub/new"), "after"),
    }


def test_files_are_replaced_only_if_wanted(tmp_path):
    (tmp_path / "old").write_text("before")
    with pytest.raises(ValueError, match=r"already holds \['old'\]"), files_into(tmp_path, "last", False) as folder:
        (folder / "old").write_text("after")
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "before"


def test_files_join_the_folder_that_is_there(tmp_path):
    """When a file was replaced, a copy with the new files took the folder's place: what other processes wrote into the
    old one meanwhile was lost, a process that stood in it was left outside, and the folder's group was another."""
    for text in ("before", "after"):
        with files_into(tmp_path / "model", last="a") as folder:
            (folder / "a").write_text(text)
        if text == "before":
            there = os.open(tmp_path / "model", os.O_RDONLY)
    os.close(os.open("theirs", os.O_CREAT | os.O_WRONLY, dir_fd=there))
    os.close(there)
    assert sorted(os.listdir(tmp_path / "model")) == ["a", "theirs"]
    assert (tmp_path / "model" / "a").read_text() == "after"


def test_readers_never_start_from_what_is_half_old(tmp_path, monkeypatch):
    """The last file is what readers start from: while the others are replaced there is none."""
    write(tmp_path, "old", joining=True)
    replace, seen = os.replace, []

    def looking(source, target):
        seen.append((tmp_path / "c").exists())
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", looking)
    write(tmp_path, "new", joining=True)
    assert seen == [False] * 3
    with files_into(tmp_path, last="c") as folder:
        (folder / "c").write_text("newer")
    assert seen[3:] == [True]
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_what_cannot_be_put_back_is_kept(tmp_path, monkeypatch):
    """When the disk failed in the middle of a replacement and again while that was undone, the old files were removed
    with the staging folder that held them."""
    write(tmp_path, "old", joining=True)
    rename, replace, left = os.rename, os.replace, [3]

    def failing(call):
        def renaming(source, target):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, "Input/output error")
            call(source, target)

        return renaming

    monkeypatch.setattr(files.os, "rename", failing(rename))
    monkeypatch.setattr(files.os, "replace", failing(replace))
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path, "new", joining=True)
    monkeypatch.undo()
    assert not (tmp_path / "c").exists()
    check_output(tmp_path / "other")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("abc", "old")


# --- killed ----------------------------------------------------------------------------------------------------------


def killed(work: Callable[[], object]) -> None:
    """Do `work` in a process of its own, which must end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def write(path: Path, text: str, joining: bool) -> None:
    """Three files, over those that are there."""
    with files_into(path, last="c") if joining else new_folder(path, overwrite=True) as folder:
        for name in "abc":
            (folder / name).write_text(text)


def is_whole(path: Path) -> bool:
    """Whether all three files are there, of the same time."""
    return {file.name for file in path.iterdir() if file.is_file()} == {*"abc"} and (
        len({(path / name).read_text() for name in "abc"}) == 1
    )


def killed_at(moment: int, work: Callable[[], object], exchange: bool) -> None:
    """Do `work` in a process of its own, which ends by SIGKILL after so many renames, or at its end."""

    def counting() -> None:
        left = moment

        def counted(call):
            def counting(*args, **kwargs):
                nonlocal left
                result = call(*args, **kwargs)
                left -= 1
                if not left:
                    die()
                return result

            return counting

        files.os.rename, files.os.replace = counted(os.rename), counted(os.replace)
        files._exchange = counted(files._exchange) if exchange else lambda *_: False
        work()
        die()

    killed(counting)


def age(folder: Path, hours: float) -> Path:
    """Have the one staging folder in a folder be as old as that."""
    (staging,) = folder.glob(".writing-*")
    then = time.time() - hours * 3600
    for path in (*staging.rglob("*"), staging):
        os.utime(path, (then, then))
    return staging


@pytest.mark.parametrize("joining", [True, False])
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("moment", range(1, 9))
def test_killed_while_a_folder_is_replaced(tmp_path, joining, exchange, moment):
    """Between the two renames of a replacement there was no folder at all, and files that joined one were half of the
    old and half of the new; what lay beside them stayed for ever.

    With one exchange it is old or new at every moment; without, it is so again after the next process has written.
    Files that join a folder are of one time, or the last, from which readers start, is missing."""
    goal = tmp_path / "model"
    write(goal, "old", joining)
    (goal / "mine").mkdir()

    killed_at(moment, lambda: write(goal, "new", joining), exchange)
    if joining:
        assert (goal / "mine").is_dir()
        assert is_whole(goal) or not (goal / "c").exists()
    elif exchange:
        assert is_whole(goal)
    check_output(tmp_path / "other")  # sweeps
    with files_into(goal, last="x"):
        pass
    assert is_whole(goal)
    assert os.listdir(tmp_path) == ["model"]
    assert not [name for name in os.listdir(goal) if name.startswith(".")]


@pytest.mark.parametrize("moment", range(1, 6))
def test_killed_while_files_are_added(tmp_path, moment):
    """What had not been there before stayed beside the old files, after these were put back: a checkpoint of before
    with a processor of after."""
    for name in "bc":
        (tmp_path / name).write_text("old")
    killed_at(moment, lambda: write(tmp_path, "new", joining=True), exchange=False)
    check_output(tmp_path / "other")
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left in (dict.fromkeys("bc", "old"), dict.fromkeys("abc", "new"))


@pytest.mark.parametrize(("joining", "moment"), [(True, 1), (True, 2), (True, 3), (False, 1)])
def test_what_was_saved_since_is_not_undone(tmp_path, monkeypatch, joining, moment):
    """A process on another host was killed while it replaced a checkpoint, which was saved again from here. A day later
    any output beside it put weights from before the kill over the newer ones, beside the newer config."""
    goal = tmp_path / "model"
    write(goal, "old", joining)
    monkeypatch.setattr(files.socket, "gethostname", lambda: "elsewhere")
    killed_at(moment, lambda: write(goal, "half", joining), exchange=False)
    monkeypatch.undo()
    write(goal, "newer", joining)
    staging = age(goal if joining else tmp_path, hours=25)
    check_output(staging.parent / "other")
    assert is_whole(goal)
    assert (goal / "a").read_text() == "newer"
    assert not staging.exists()


def test_what_was_copied_there_since_is_not_undone(tmp_path):
    """Somebody may mend a folder by hand, with files that keep their times, before anything of ours is run again."""
    write(tmp_path / "backup", "theirs", joining=False)
    for file in (tmp_path / "backup").iterdir():
        os.utime(file, (0, 0))
    goal = tmp_path / "model"
    write(goal, "old", joining=True)
    killed_at(2, lambda: write(goal, "half", joining=True), exchange=False)
    age(goal, hours=1)
    shutil.copytree(tmp_path / "backup", goal, copy_function=shutil.copy2, dirs_exist_ok=True)
    check_output(goal / "other")
    assert is_whole(goal)
    assert (goal / "a").read_text() == "theirs"


@pytest.mark.parametrize("joining", [True, False])
@pytest.mark.parametrize("moment", range(1, 5))
def test_what_another_host_left_is_put_back_where_nobody_has_saved_since(tmp_path, monkeypatch, joining, moment):
    goal = tmp_path / "model"
    write(goal, "old", joining)
    monkeypatch.setattr(files.socket, "gethostname", lambda: "elsewhere")
    killed_at(moment, lambda: write(goal, "new", joining), exchange=False)
    monkeypatch.undo()
    monkeypatch.setattr(files, "_ABANDONED_SECONDS", 0)
    check_output((goal if joining else tmp_path) / "other")
    assert is_whole(goal)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("writer", ["folder", "file", "joining"])
def test_what_a_killed_process_left_is_swept_and_what_a_live_one_writes_is_not(tmp_path, writer):
    """Temporary folders of a killed process stayed beside the output for ever."""

    def begin(name: str, then: Callable[[], object]) -> None:
        if writer == "file":
            with new_file(tmp_path / name) as file:
                file.write_text("half")
                then()
        else:
            with new_folder(tmp_path / name) if writer == "folder" else files_into(tmp_path, last=name) as folder:
                (folder / name).write_text("half")
                then()

    killed(lambda: begin("a", die))
    assert len(os.listdir(tmp_path)) == 1
    begin("b", lambda: begin("c", lambda: None))
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]


def test_what_another_host_writes_is_left_alone_for_a_day(tmp_path, monkeypatch):
    """On a network file system a lock need not reach other hosts: a live process there would look like a dead one."""
    monkeypatch.setattr(files.socket, "gethostname", lambda: "elsewhere")
    killed(lambda: write_and_die(tmp_path))
    monkeypatch.undo()
    check_output(tmp_path / "x")
    (staging,) = tmp_path.iterdir()
    for path in (*staging.rglob("*"), staging):
        os.utime(path, (0, 0))
    check_output(tmp_path / "x")
    assert not os.listdir(tmp_path)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Some network file systems have none: what is written is written all the same, and swept when it is old."""

    def acquire(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.FileLock, "acquire", acquire)
    with new_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("new")
        check_output(tmp_path / "other")
    assert (tmp_path / "model" / "a").read_text() == "new"
    killed(lambda: write_and_die(tmp_path / "deep"))
    check_output(tmp_path / "deep" / "x")
    (staging,) = (tmp_path / "deep").iterdir()
    for path in (*staging.rglob("*"), staging):
        os.utime(path, (0, 0))
    check_output(tmp_path / "deep" / "x")
    assert not os.listdir(tmp_path / "deep")


def write_and_die(path: Path) -> None:
    with new_folder(path / "model"):
        die()


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_no_file_holds_what_is_no_json(tmp_path):
    """A run that had diverged wrote NaN into run.json, which only Python reads."""
    given = {"a": [float("nan"), np.float32("inf"), np.float64("-inf"), 1.5], "b": (np.int64(3), True, None, "NaN")}
    expected = {"a": [None, None, None, 1.5], "b": [3, True, None, "NaN"]}
    write_json(tmp_path / "a.json", given)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse) == expected
    assert json.loads(as_json(given), parse_constant=refuse) == expected
    assert len(as_json({"a": "\u2028\n"}).splitlines()) == 1


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_says_so_and_where(tmp_path, monkeypatch, error):
    """Libraries that write by themselves raise what they like, with no name and often no reason."""
    monkeypatch.setattr(disk, "_has_space", lambda _: False)
    with pytest.raises(DiskFull, match=f"No space left on device where {tmp_path} is"), new_folder(tmp_path / "model"):
        raise error
    assert os.listdir(tmp_path) == []


def test_what_is_no_full_disk_stays_what_it_is(tmp_path):
    for error in (RuntimeError("shape"), ValueError("wrong"), OSError(errno.EIO, "Input/output error")):
        with pytest.raises(type(error)) as caught, new_folder(tmp_path / "model"):
            raise error
        assert caught.value is error


def test_whether_there_is_space_is_tried(tmp_path, monkeypatch):
    assert disk._has_space(tmp_path)

    if Path("/dev/full").exists():
        with Path("/dev/full").open("wb") as device:
            monkeypatch.setattr(disk.tempfile, "TemporaryFile", lambda **_: device)
            assert not disk._has_space(tmp_path)


def test_what_is_left_of_a_checkpoint_goes(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    with pytest.raises(RuntimeError), whole_checkpoint(folder, "last"):
        write_then_raise(folder / "a", RuntimeError("shape"))
    assert not folder.exists()
    folder.mkdir()
    (folder / "last").write_text("")
    with pytest.raises(RuntimeError), whole_checkpoint(folder, "last"):
        write_then_raise(folder / "a", RuntimeError("shape"))
    assert folder.exists()


def killed_in(call: Callable[[], None]) -> None:
    """A process that dies inside; no block of its own is left in order."""
    child = os.fork()
    if not child:
        call()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_folder_that_another_process_removes_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    """Workers that wrote shards into one folder swept it meanwhile: a folder that had just been made is empty for a
    moment. Where it went as its lock was being made, one of them found no folder to write into."""
    acquire, removed = files.FileLock.acquire, []

    def removed_at_first(lock, *args, **kwargs):
        if not removed:
            removed.append(Path(lock.lock_file).parent)
            removed[0].rmdir()
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", lock.lock_file)
        return acquire(lock, *args, **kwargs)

    monkeypatch.setattr(files.FileLock, "acquire", removed_at_first)
    with new_file(tmp_path / "a.txt") as new:
        new.write_text("a")
    assert removed
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_killed_before_its_lock_was_there(tmp_path, monkeypatch):
    """An empty staging folder without a lock was left alone for a day."""
    with monkeypatch.context() as patch:
        patch.setattr(files, "_lock", die)
        patch.setattr(files, "FileLock", lambda path: path)
        killed_in(lambda: check_output(tmp_path / "model"))
    assert len(os.listdir(tmp_path)) == 1
    sweep(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("first", ["lock", "new"])
def test_killed_while_it_clears_up(tmp_path, monkeypatch, first):
    """The lock could go before what it was for, which then was nobody's for a day."""
    rmtree = shutil.rmtree
    listed = os.scandir

    def some(path: Path, *_: object, **__: object) -> None:
        if not Path(path).name.startswith(".writing-"):
            return rmtree(path)
        for entry in sorted(listed(path), key=lambda entry: entry.name != first):
            rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
            die()

    def write() -> None:
        with new_folder(tmp_path / "model") as folder:
            (folder / "config.json").write_text("{}")
            monkeypatch.setattr(shutil, "rmtree", some)

    killed_in(write)
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_goes_at_once(tmp_path, monkeypatch):
    """A working folder that was half removed could not be gone on from, nor begun anew: it was somebody else's."""
    (tmp_path / "m.training").mkdir()
    for name in ("recipe.json", "labels.jsonl"):
        (tmp_path / "m.training" / name).write_text("{}")
    remove_folder(tmp_path / "absent")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        killed_in(lambda: remove_folder(tmp_path / "m.training"))
    assert not (tmp_path / "m.training").exists()
    sweep(tmp_path)
    assert os.listdir(tmp_path) == []
