"""Outputs are written whole or not at all."""

import errno
import os
import stat
from pathlib import Path

import pytest

from zipper_lm.utils import files
from zipper_lm.utils.files import check_output, new_file, new_folder


def fill_up(_: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_then_raise(file: Path, error: BaseException) -> None:
    file.write_text("half")
    raise error


def test_folder_appears_only_when_whole(tmp_path):
    goal = tmp_path / "a" / "b" / "model"
    with new_folder(goal) as folder:
        assert folder.parent == goal.parent
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

    monkeypatch.setattr(files.os, "rename", second_fails)
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
        pytest.raises(ValueError, match=r"output: cannot write into .*file"),
        writer(tmp_path / "file" / "out"),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("writer", [new_folder, new_file])
def test_refused_permission_is_a_value_error_and_leaves_no_parents(tmp_path, monkeypatch, writer):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    parent = tmp_path / "closed"
    parent.mkdir()
    monkeypatch.setattr(Path, "mkdir" if writer is new_folder else "touch", refuse)
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
