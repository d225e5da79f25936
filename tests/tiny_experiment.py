"""An experiment small enough to run in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from tiny_recipes import plain_recipe


def plan(folder: Path, **changes: Any) -> Path:
    """An experiment file and its recipe: Zipper, with two trials, and the single decoder, at two shares, two seeds."""
    recipe = plain_recipe(folder / "unused")
    recipe.pop("output")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "output": "unused"}, sort_keys=False))
    content = {
        "question": "Which writes better?",
        "recipe": "recipe.yaml",
        "set": ["training.steps=1"],
        "arms": {
            "zipper": {"trials": {"slow": ["training.learning_rate=1e-6"], "fast": ["training.learning_rate=1e-2"]}},
            "single": {"set": ["architecture=single-decoder"]},
        },
        "points": {"half": ["data.fraction=0.5"], "all": []},
        "axis": "share of the pairs",
        "seeds": [1, 2],
        "tasks": ["asr", "tts"],
        **changes,
    }
    (folder / "contest.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "contest.yaml"
