"""The files that name versions say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [Requirement(line) for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["serve"])]


def bound(name: str, operator: str) -> Version | None:
    """The version that a requirement of pyproject.toml puts after an operator."""
    (asked,) = (r for r in ASKED if r.name == name)
    return next((Version(s.version) for s in asked.specifier if s.operator == operator), None)


def pins(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text().splitlines()
    return {name: Version(v) for name, v in (line.split("==") for line in lines if not line.startswith("#"))}


def test_the_oldest_versions_are_those_that_the_package_allows() -> None:
    """Minimums that nobody ran did not hold: typer, tokenizers, safetensors and huggingface-hub."""
    allowed = {r.name: bound(r.name, ">=") for r in ASKED if r.name != "torch"}  # as in constraints.txt
    assert pins("constraints-oldest.txt") == allowed


def test_what_is_pinned_is_allowed() -> None:
    pinned = pins("constraints.txt")
    for asked in ASKED:
        name = asked.name if asked.name in pinned else asked.name.replace("-", "_")
        key = next(n for n in pinned if n.lower().replace("-", "_") == name.lower().replace("-", "_"))
        assert pinned[key] in asked.specifier, asked


def test_nothing_newer_than_was_tested_is_allowed() -> None:
    """`pip install` took transformers 5.24, in which caches have another name, and towers forgot what they had read."""
    for name in ("torch", "transformers"):
        cap = bound(name, "<")
        assert cap is not None, f"{name} has no upper bound"
        assert len(cap.release) == 2, f"{name}: the cap is a minor version"
    made_with = re.search(r"with transformers ([\d.]+) ", (ROOT / "docs" / "towers.md").read_text())
    assert made_with is not None
    cap = bound("transformers", "<")
    assert cap is not None
    assert Version(made_with[1]).release[:2] == (cap.major, cap.minor - 1), "docs/towers.md is of another"


def test_limits_name_the_versions() -> None:
    oldest, cap = bound("transformers", ">="), bound("transformers", "<")
    assert oldest is not None
    assert cap is not None
    said = f"transformers {oldest.major}.{oldest.minor} to {cap.major}.{cap.minor - 1}"
    assert said in (ROOT / "docs" / "limits.md").read_text()
