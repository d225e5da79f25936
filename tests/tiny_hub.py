"""A folder that stands in for the Hub, where a model is uploaded to it: repositories are folders ``owner/name``."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError


class Hub:
    """Replaces what `HfApi` sends by changes to a folder.

    Attributes:
        root: the folder. calls: the arguments of each method's latest call. private: whether each repository is.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.calls: dict[str, dict[str, Any]] = {}
        self.private: dict[str, bool] = {}
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        for name in ("whoami", "create_repo", "repo_info", "create_branch", "hf_hub_download", "upload_folder"):
            monkeypatch.setattr(HfApi, name, self._method(name))

    def _method(self, name: str) -> Any:
        def method(api: HfApi, *args: Any, **kwargs: Any) -> Any:
            if args:
                kwargs["repo_id"] = args[0]
            self.calls[name] = kwargs | ({"token": api.token} if api.token else {})
            return getattr(self, name)(*args[1:], **kwargs)

        return method

    def whoami(self) -> dict[str, str]:
        return {"name": "me"}

    def create_repo(self, *, repo_id: str, private: bool | None, **_: Any) -> None:
        if not (self.root / repo_id).exists():
            (self.root / repo_id).mkdir(parents=True)
            self.private[repo_id] = bool(private)

    def repo_info(self, *, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(private=self.private[repo_id])

    def create_branch(self, **_: Any) -> None:
        """Branches are not told apart here."""

    def hf_hub_download(self, file: str, *, repo_id: str, **_: Any) -> str:
        if not (self.root / repo_id / file).is_file():
            error = EntryNotFoundError.__new__(EntryNotFoundError)
            error.args = (f"no {file}",)
            raise error
        return str(self.root / repo_id / file)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        ignore_patterns: list[str] | None,
        delete_patterns: list[str],
        **kwargs: Any,
    ) -> CommitInfo:
        goal = self.root / repo_id
        for file in [f for f in goal.rglob("*") if f.is_file()]:
            if any(fnmatch.fnmatch(str(file.relative_to(goal)), pattern) for pattern in delete_patterns):
                file.unlink()
        left = shutil.ignore_patterns(*ignore_patterns or [])
        shutil.copytree(folder_path, goal, ignore=left, dirs_exist_ok=True)
        return CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/{'0' * 40}",
            commit_message=kwargs["commit_message"],
            commit_description="",
            oid="0" * 40,
        )
