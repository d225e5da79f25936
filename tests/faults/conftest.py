"""What tests of faults share: what starts commands, runs without a fault, and the count of faults."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import Zygote, beside, contents, listing, read_moments
from tests.faults.scenes import Scene

_PROPERTY = "faults injected"


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    yield made
    made.close()


class Reference:
    """What a scene leaves if nothing happens to it, and the moments that it has."""

    def __init__(self, zygote: Zygote, scene: Scene, folder: Path) -> None:
        self.folder = scene.lay(folder)
        notes = beside(folder) / "moments"
        ended = zygote.run(folder, scene.words, notes=notes)
        assert ended.status == 0, ended.told
        self.moments = read_moments(notes)
        self.contents, self.listing = contents(folder), listing(folder)


Find = Callable[[Scene], Reference]
Count = Callable[..., None]


@pytest.fixture(scope="session")
def reference(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Scene], Reference]:
    """Of a scene; made once."""
    base = tmp_path_factory.mktemp("reference")
    made: dict[str, Reference] = {}

    def find(scene: Scene) -> Reference:
        if scene.name not in made:
            made[scene.name] = Reference(zygote, scene, base / scene.name / "run")
        return made[scene.name]

    return find


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Tells the figure of `make test-faults` of a fault that was injected, by its kind."""

    def told(kind: str, number: int = 1) -> None:
        record_property(_PROPERTY, [kind, number])

    return told


_found: dict[str, dict[str, int]] = defaultdict(lambda: {"injected": 0, "survived": 0, "lost": 0})


def pytest_runtest_logreport(report: Any) -> None:
    """A fault is survived if its test passes."""
    if report.when == "call":
        for name, value in report.user_properties:
            if name == _PROPERTY:
                kind, number = value
                _found[kind]["injected"] += number
                _found[kind]["survived" if report.passed else "lost"] += number


def pytest_sessionfinish(session: pytest.Session) -> None:
    """`FAULTS_RECORD` names a file for the figure."""
    if (file := os.environ.get("FAULTS_RECORD")) and not hasattr(session.config, "workerinput"):
        total = {key: sum(kind[key] for kind in _found.values()) for key in ("injected", "survived", "lost")}
        record = {"told": "faults put into runs", **total, "kinds": dict(sorted(_found.items()))}
        Path(file).write_text(json.dumps(record) + "\n", encoding="utf-8")
