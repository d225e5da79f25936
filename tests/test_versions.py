"""The files that name versions say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parent.parent


def test_the_oldest_versions_are_those_that_the_package_allows() -> None:
    """Minimums that nobody ran did not hold: typer, tokenizers, safetensors and huggingface-hub."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = dict(re.findall(r"([\w-]+)>=([\d.]+)", " ".join(asked)))
    del allowed["torch"]  # as in constraints.txt
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned.keys() == allowed.keys()
    for name, version in pinned.items():
        assert Version(version) == Version(allowed[name]), name
