"""What is run under faults: small, and with as many kinds of work and of writing as a real one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.tiny_recipes import plain_recipe, workshop

SAVE_EVERY = 2


@dataclass(frozen=True)
class Scene:
    """A command in a folder: its words, and those by which it goes on."""

    name: str
    words: tuple[str, ...]
    again: tuple[str, ...]

    def lay(self, folder: Path) -> Path:
        """What it reads, in a new folder."""
        folder.mkdir(parents=True)
        if not (home := folder.parent / "home").exists():
            shutil.copytree(workshop(), home)
        for name, content in _FILES[self.name]().items():
            (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
        return folder


def _near(plain: Any) -> Any:
    """Places of the workshop as places beside the folder, which are the same in each run."""
    if isinstance(plain, dict):
        return {key: _near(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_near(value) for value in plain]
    return plain.replace(str(workshop()), "../home") if isinstance(plain, str) else plain


def fusion(**changes: Any) -> dict[str, Any]:
    """A tower made on the way, pseudo-labels, evaluations, a cache of prefixes."""
    text = {
        "source": "text",
        "input_projection_layer": 1,
        "pretrain": {
            "codec": {"kind": "text", "options": {"vocab_size": 32}},
            "backbone": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            "training": {"steps": 3, "batch_size": 4, "save_every": SAVE_EVERY, "arguments": {"disable_tqdm": True}},
        },
    }
    plain = plain_recipe(
        Path("out"),
        towers={"text": text, "speech": {"source": str(workshop() / "speech"), "train": "full"}},
        pseudo_labels={"task": "speech->text", "model": "labeller", "steps": 2, "limit": 6},
        data={"source": str(workshop() / "data"), "validation_limit": 2},
        training={
            "steps": 6,
            "save_every": SAVE_EVERY,
            "evaluate_every": 3,
            "prefix_cache": "disk",
            "corrupt": {"speech": 0.1},
        },
    )
    return _near(plain | changes)


def _of_experiment() -> dict[str, Any]:
    recipe = _near(plain_recipe(Path("unused"), training={"steps": 4, "save_every": SAVE_EVERY}))
    contest = {
        "question": "Which writes better?",
        "recipe": "recipe.yaml",
        "set": [],
        "arms": {
            "zipper": {"trials": {"slow": ["training.learning_rate=1e-6"], "fast": []}},
            "single": {"set": ["architecture=single-decoder"]},
        },
        "points": {"all": []},
        "axis": "share of the pairs",
        "seeds": [1],
        "tasks": ["asr"],
    }
    return {"recipe.yaml": recipe, "contest.yaml": contest}


DDP_TIMEOUT = 20
"""Seconds."""
_QUICK = {"steps": 4, "save_every": SAVE_EVERY, "arguments": {"disable_tqdm": True, "use_cpu": True}}


def _plain() -> dict[str, Any]:
    """Nothing but two towers and a training."""
    here = {"training": _QUICK, "generation": {"text": {"max_new_tokens": 2}, "speech": {"max_new_tokens": 2}}}
    return {"recipe.yaml": _near(plain_recipe(Path("out"), **here))}


def _together() -> dict[str, Any]:
    """Of two processes."""
    plain = _plain()
    plain["recipe.yaml"]["training"]["arguments"] |= {"ddp_timeout": DDP_TIMEOUT}
    return plain


def _reading() -> dict[str, Any]:
    """Data is read by a process of its own."""
    plain = _plain()
    plain["recipe.yaml"]["training"]["arguments"] |= {"dataloader_num_workers": 1}
    return plain


FUSE = Scene("fuse", ("fuse", "recipe.yaml"), ("fuse", "recipe.yaml", "--resume"))
PLAIN = Scene("plain", FUSE.words, FUSE.again)
"""A fusion without all that."""
READING = Scene("reading", FUSE.words, FUSE.again)
"""One with a process that reads data."""
TOGETHER = Scene("together", FUSE.words, FUSE.again)
"""One in two processes."""
_PREPARE = ("prepare", "recipe.yaml", "--output", "out")
PREPARE = Scene("prepare", _PREPARE, (*_PREPARE, "--resume"))
_EXPERIMENT = ("experiment", "contest.yaml", "--results", "out", "--work", "work")
EXPERIMENT = Scene("experiment", _EXPERIMENT, _EXPERIMENT)

_FILES = {
    "fuse": lambda: {"recipe.yaml": fusion()},
    "prepare": lambda: {"recipe.yaml": _near(plain_recipe(Path("unused")))},
    "experiment": _of_experiment,
    "plain": _plain,
    "together": _together,
    "reading": _reading,
}
