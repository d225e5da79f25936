"""Tasks: which modalities of a row are given, which are to be written; and a weighted mixture of them."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from zipper_lm.data.document import Document, Segment
from zipper_lm.data.joining import Joiner, join_rows
from zipper_lm.data.sources.readers import Rows
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


class TaskMixture(Dataset[Document]):
    """Documents of several tasks, one per row; which task a row serves is drawn anew in each epoch.

    The draw depends on nothing but `seed`, epoch and index, so it is the same in any order of access, with
    any number of workers, and after a resume. Rows that are whole documents come out as they are.

    Args:
        rows: what `read_rows` gives, or any sequence of rows and documents.
        weights: task template to weight, relative to each other. May be empty if all rows are documents.
        seed: seed of the draws, from 0.
        interleave: probability that a second row, with a task of its own, follows in the same document.
        join: probability that a row is joined with another one, end to end, into one (`zipper_lm.data.joining`); of all
            tasks, or by template, 0 where it is missing.
        how: by modality, how two segments are joined; needed with `join`.
        towers: the modalities there are, or `None` not to check.

    Raises:
        ValueError: for no rows, a malformed task, weights that are negative, not finite or all zero,
            `interleave` or `join` outside [0, 1], `join` of a task that is not there or that names a modality twice
            (the later one would be the same sound again), a negative seed, or a first row that lacks a modality of a
            task.
    """

    def __init__(
        self,
        rows: Sequence[Row | Document],
        weights: Mapping[str, float],
        seed: int = 0,
        interleave: float = 0.0,
        join: float | Mapping[str, float] = 0.0,
        how: Mapping[str, Joiner] | None = None,
        towers: Sequence[str] | None = None,
    ) -> None:
        if not len(rows):
            raise ValueError("tasks: there are no rows")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"tasks: seed must be a whole number from 0, got {seed!r}")
        shares = dict(join) if isinstance(join, Mapping) else dict.fromkeys(weights, join)
        for name, share in (("interleave", interleave), *((f"join of {n!r}", share) for n, share in shares.items())):
            if not 0 <= share <= 1:
                raise ValueError(f"tasks: {name} must be between 0 and 1, got {share!r}")
        if unknown := sorted(set(shares) - set(weights)):
            raise ValueError(f"tasks: join names {unknown}, but the tasks are {sorted(weights)}")
        self.rows, self.seed, self.interleave, self.how = rows, seed, interleave, how or {}
        self.tasks, self._probabilities = read_weights(weights, towers, rows)
        self._join = [shares.get(name, 0.0) for name, weight in weights.items() if weight > 0]
        for task in self.tasks:
            if first := _first_row(rows):
                build_document(task, first)
        for task, share in zip(self.tasks, self._join):
            if share and task.repeats:
                raise ValueError(f"tasks: join cannot be used with {str(task)!r}, which names a modality twice")
        self._twins = [_find_twins(task, rows) for task in self.tasks]
        # In shared memory: workers that outlive an epoch (persistent_workers) see the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that documents are drawn for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw as in this epoch from now on, in all workers. Accelerate's loaders call it."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Document:
        index = range(len(self.rows))[index]  # as a list does: negative from the end, IndexError outside
        row = self.rows[index]
        if isinstance(row, Document):
            return row
        draw = np.random.default_rng((self.seed, self.epoch, index))
        document = self._one(index, row, draw)
        if len(self.rows) > 1 and draw.random() < self.interleave:
            other, following = self._another(index, draw)
            if not isinstance(following, Document):
                document = Document([*document, *self._one(other, following, draw)])
        return document

    def _another(self, index: int, draw: np.random.Generator) -> tuple[int, Row | Document]:
        other = (index + 1 + int(draw.integers(len(self.rows) - 1))) % len(self.rows)
        return other, self.rows[other]

    def _one(self, index: int, row: Row, draw: np.random.Generator) -> Document:
        if not self.tasks:
            raise ValueError(f"tasks: row {index} is no whole document, and there are no tasks to make one")
        chance, following = 1.0, None
        if (most := max(self._join)) and len(self.rows) > 1 and (chance := draw.random()) < most:
            _, following = self._another(index, draw)
        number = int(draw.choice(len(self.tasks), p=self._probabilities))
        if following is not None and not isinstance(following, Document) and chance < self._join[number]:
            row = join_rows(row, following, self.how)
        task, twins = self.tasks[number], {}
        for modality, groups in self._twins[number].items():
            others = [i for i in groups.get(index, ()) if i != index]
            wanted = min(len(others), task.modalities.count(modality) - 1)
            twins[modality] = [self.rows[int(i)] for i in draw.choice(others, wanted, replace=False)] if wanted else []
        return build_document(task, row, twins)  # type: ignore[arg-type]


def read_weights(
    weights: Mapping[str, float], towers: Sequence[str] | None = None, rows: Sequence[Row | Document] = ()
) -> tuple[list[Task], np.ndarray]:
    """Tasks with a weight above zero, and their probabilities, float64 [tasks].

    Args:
        weights: template to weight. towers: the modalities there are, or `None` not to check.
        rows: what they are for; documents need no task.

    Raises:
        ValueError: for a malformed task, a weight that is negative or no finite number, or none above zero.
    """
    tasks = {name: parse_task(name, towers) for name in weights}
    for name, weight in weights.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"tasks: the weight of {name!r} must be a finite number from 0, got {weight!r}")
    total = sum(weights.values())
    if not total:
        if not weights and _first_row(rows) is None:
            return [], np.zeros(0)
        raise ValueError("tasks: give at least one task a weight above zero, such as speech->text: 1")
    kept = [name for name in weights if weights[name] > 0]
    return [tasks[name] for name in kept], np.array([weights[name] / total for name in kept])


def _find_twins(task: Task, rows: Sequence[Row | Document]) -> dict[str, dict[int, list[int]]]:
    """For each modality that a task repeats: row number to the numbers of the rows that say the same.

    Two rows say the same if all other modalities of the task are equal strings in both. Sound as bytes or
    arrays is never compared: no two recordings are equal, and reading them all would take long.
    """
    found: dict[str, dict[int, list[int]]] = {}
    first = _first_row(rows)
    for modality, times in Counter(task.modalities).items():
        others = sorted(set(task.modalities) - {modality})
        if first and times > 1 and others and all(isinstance(_key(first, o), str) for o in others):
            groups = defaultdict(list)
            for number, key in enumerate(zip(*(_keys(rows, o) for o in others))):
                if all(isinstance(part, str) for part in key):
                    groups[key].append(number)
            found[modality] = {n: group for group in groups.values() if len(group) > 1 for n in group}
    return found


def _first_row(rows: Sequence[Row | Document]) -> Row | None:
    return next((row for row in rows if not isinstance(row, Document)), None)


def _keys(rows: Sequence[Row | Document], name: str) -> list[Any]:
    return rows.column(name) if isinstance(rows, Rows) else [_key(row, name) for row in rows]


def _key(row: Row | Document, name: str) -> Any:
    value = None if isinstance(row, Document) else row.get(name)
    return value.value if isinstance(value, Segment) else value
