"""Where things lie: what a record says of a folder, and what others may read of it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_FOLDERS = re.compile(r"""(?:file://|(?<![\w./<])~?)/(?=[^\s/])(?:[^/:;"'`|<>\n]+/+)*""")
"""The folders of an absolute path within a text; no part of an id, a web address or a tag such as ``</s>``."""


def cache_folder() -> Path:
    """``$ZIPPER_CACHE``, else ``zipper`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(os.environ.get("ZIPPER_CACHE", str(Path(base) / "zipper")))


def working_folder(output: str | Path) -> Path:
    """Where a run that will write `output` keeps its checkpoints."""
    return beside(output, "training")


def beside(output: str | Path, suffix: str) -> Path:
    """The working folder of an output: its name, a dot and `suffix`, whether or not the name ends in a slash."""
    return Path(f"{Path(output)}.{suffix}")


def place_of(source: str | Path) -> str:
    """What a record says of a folder or file: its absolute path. A Hub id stays what it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else str(source)


def public_name(text: str) -> str:
    """What others may read of a `place_of` or of a text: of every path of this machine only the last part."""
    return Path(text).name if Path(text).is_absolute() else _FOLDERS.sub("", text)


def public(value: Any) -> Any:
    """What others may read of a JSON value: `public_name` of every text in it."""
    return each_text(value, public_name)


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed, but for keys."""
    if isinstance(value, dict):
        return {k: each_text(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [each_text(v, change) for v in value]
    return change(value) if isinstance(value, str) else value


def inside(folder: Path, name: Any, where: str) -> Path:
    """A file that something in a folder names, there or below it.

    Args:
        folder: where the one that names it lies. name: from there. where: what messages begin with.

    Raises:
        ValueError: if the name is no text or no path, or leads out of the folder: by ``..``, from the root, or by a
            link. What the Hub's cache has are links, to files beside the folder.
    """
    file = folder / name if isinstance(name, str) else folder
    if not isinstance(name, str) or not name or "\0" in name or _is_no_name(file):
        raise ValueError(f"{where} {name!r:.80} is no path")
    here, there = os.path.realpath(folder), os.path.realpath(file)
    if not there.startswith((os.path.join(here, ""), os.path.join(_blobs(here), ""))):
        raise ValueError(f"{where} {name!r:.200} leads out of the folder {folder}")
    return file


def is_file(path: str | Path) -> bool:
    """Whether a file is there; what is too long for a name, or none for another reason, is none."""
    return not _is_no_name(Path(path)) and Path(path).is_file()


def _is_no_name(path: Path) -> bool:
    """Whether the system takes a path for no name at all, such as one that is too long."""
    try:
        path.is_file()
    except OSError as error:
        return error.errno != errno.EACCES
    return False


def _blobs(folder: str) -> str:
    """Where the Hub's cache has the files that the links of a snapshot lead to; of another folder, itself."""
    repo, found, _ = folder.partition(f"{os.sep}snapshots{os.sep}")
    return os.path.join(repo, "blobs") if found and os.path.isdir(os.path.join(repo, "refs")) else folder


def relative_paths(value: Any) -> list[str]:
    """Texts in a JSON value that are relative paths of files or folders here; a Hub id may look the same."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sorted({path for v in value for path in relative_paths(v)})
    if not isinstance(value, str) or Path(value).name == value or Path(value).is_absolute():
        return []
    with suppress(OSError, ValueError):  # a text that is too long for a name, or holds what no name may
        return [value] if Path(value).exists() else []
    return []


def is_hub_id(source: str) -> bool:
    """Whether a source that is no folder here can be an ``owner/name`` on the Hub."""
    with suppress(HFValidationError):
        validate_repo_id(source)
        return "/" in source
    return False
