"""What every test needs: no network, few threads, and the tiny models of `tiny.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tiny import tiny_backbone, tiny_model
from tiny_hub import Hub
from tiny_recipes import tiny_recipe
from transformers import PreTrainedModel
from transformers.utils import logging

from zipper_lm import ZipperModel
from zipper_lm.jobs.prepare import prepare
from zipper_lm.utils import known_hashes

__all__ = ["tiny_backbone", "tiny_model"]

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: what they compute must round as it does here


@pytest.fixture(autouse=True)
def no_hashes_of_the_users(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests load is not remembered beside what the user has loaded."""
    folder = tmp_path_factory.getbasetemp() / "remembered"
    monkeypatch.setattr(known_hashes, "cache_folder", lambda: folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A stand-in for uploads to the Hub, in a folder."""
    return Hub(tmp_path / "hub", monkeypatch)


@pytest.fixture
def hub_cache(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes commits of a model, the first of them ``main``, as the Hub's cache keeps them; gives how to load."""

    def keep(repo_id: str, commits: dict[str, PreTrainedModel], card: str | None = None) -> dict[str, Any]:
        root = tmp_path / "cache" / f"models--{repo_id.replace('/', '--')}"
        for commit, backbone in commits.items():
            backbone.save_pretrained(root / "snapshots" / commit)
            if card is not None:
                (root / "snapshots" / commit / "README.md").write_text(card)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(next(iter(commits)))
        return {"cache_dir": tmp_path / "cache", "local_files_only": True}

    return keep


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `zipper prepare` makes of the tiny recipe, in shards of five rows. For tests to read or copy."""
    folder = tmp_path_factory.mktemp("prepare") / "data"
    prepare(tiny_recipe(folder), folder, shard_rows=5)
    return folder


@pytest.fixture
def model() -> ZipperModel:
    return tiny_model(gate=0.5)
