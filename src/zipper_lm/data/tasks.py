"""Tasks: which modalities of a row are given, which are to be written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from zipper_lm.data.document import Document, Segment
from zipper_lm.data.sources.table import Row

_NAME = re.compile(r"\w(?:[\w.-]*\w)?")


@dataclass(frozen=True)
class Task:
    """Modalities in reading order: first those that are given, then those to be written."""

    given: tuple[str, ...]
    targets: tuple[str, ...]

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modality of each segment, in reading order."""
        return self.given + self.targets

    @property
    def repeats(self) -> bool:
        """Whether it names a modality twice."""
        return len(set(self.modalities)) < len(self.modalities)

    def __str__(self) -> str:
        return "->".join(("+".join(self.given), *self.targets))


def parse_task(text: str, towers: Sequence[str] | None = None) -> Task:
    """Read a template such as ``"speech->text"``, ``"text+image->speech"`` or ``"speech->text->speech"``.

    The names before the first arrow are given, joined by ``+``; each name after it is a target. Nothing may be given:
    ``"->speech"`` is sound alone, which a tower reads as it did before it was fused.

    Args:
        text: the template.
        towers: the modalities there are, or `None` not to check.

    Raises:
        ValueError: for another syntax, an empty name, or a modality that is not among `towers`.
    """
    form = "write given->target, such as speech->text or text+image->speech"
    if not isinstance(text, str):
        raise ValueError(f"task must be a string, got {text!r}; {form}")
    first, *rest = (part.strip() for part in text.split("->"))
    if not rest:
        raise ValueError(f"task {text!r} has no arrow; {form}")
    given = tuple(name.strip() for name in first.split("+")) if first else ()
    for name in (*given, *rest):
        if not name:
            raise ValueError(f"task {text!r} has an empty name; {form}")
        if "+" in name:
            raise ValueError(f"task {text!r} has a + after the first arrow; targets follow each other by ->")
        if not _NAME.fullmatch(name):
            raise ValueError(f"task {text!r}: {name!r} is no modality name; {form}")
        if towers is not None and name not in towers:
            raise ValueError(f"task {text!r}: unknown modality {name!r}; the towers are {sorted(towers)}")
    return Task(given, tuple(rest))


def build_document(task: Task | str, row: Row, twins: Mapping[str, Sequence[Row]] | None = None) -> Document:
    """One document of a task, made from a row.

    A value that is a `Segment` lends its value and ids: rows whose tokens are known need no second encoding.

    Args:
        task: a task, or its template.
        row: modality name to value.
        twins: for a modality that the task names more than once, rows that say the same. The first segment
            takes its value from `row`, the later ones from the twins in turn. Were it all one recording, a
            tower could copy its own earlier segment, and would learn to look there, not at the other tower;
            without a twin `row` serves again.

    Raises:
        ValueError: if a row lacks a modality of the task.
    """
    task = parse_task(task) if isinstance(task, str) else task
    used: Counter[str] = Counter()
    segments = []
    for place, modality in enumerate(task.modalities):
        sources = [row, *(twins or {}).get(modality, ())]
        value = sources[used[modality] % len(sources)].get(modality)
        used[modality] += 1
        if value is None:
            raise ValueError(f"task {str(task)!r}: the row has no {modality!r}; it has {sorted(row)}")
        ids = value.ids if isinstance(value, Segment) else None
        value = value.value if isinstance(value, Segment) else value
        segments.append(Segment(modality, value=value, ids=ids, target=place >= len(task.given)))
    return Document(segments)
