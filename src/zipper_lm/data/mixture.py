"""A weighted mixture of tasks over rows: one document a row, drawn anew in each epoch.

Two rows may be joined end to end into one: a longer sound, and all that is said in it. Where pairs are few, a model
learns whole rows by heart: which text goes with which sound. Of pairs of rows there are many more, and in them it has
to find the place (measured for recognisers by Lam et al. 2022, arXiv 2210.15398).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from zipper_lm.codecs.codec import Codec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.document import Document, Segment
from zipper_lm.data.draws import first_randoms
from zipper_lm.data.encoding import is_document, stream_lengths
from zipper_lm.data.sources.readers import Rows
from zipper_lm.data.sources.table import Row
from zipper_lm.data.tasks import Task, build_document, parse_task
from zipper_lm.data.token_ids import TokenIds

Joiner = Callable[[Segment, Segment], Segment]
"""Two encoded segments of one modality to one."""


class _Part(NamedTuple):
    """A row's share of a document."""

    task: Task
    row: int
    partner: int | None  # the row that it is joined with
    twins: Mapping[str, Sequence[int]]  # rows that say the same, by modality


class TaskMixture(Dataset[Document]):
    """Documents of several tasks, one per row; which task a row serves is drawn anew in each epoch.

    The draw depends on nothing but `seed`, epoch and index, so it is the same in any order of access, with
    any number of workers, and after a resume. Rows that are whole documents come out as they are.

    Args:
        rows: what `read_rows` gives, or any sequence of rows and documents.
        weights: task template to weight, relative to each other. May be empty if all rows are documents.
        seed: seed of the draws, from 0.
        interleave: probability that a second row, with a task of its own, follows in the same document.
        join: probability that a row is joined with another one, end to end, into one (`join_rows`); of all tasks, or by
            template, 0 where it is missing.
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
        parts = self._draw(index)
        return Document([segment for part in parts for segment in self._build(part, row if part is parts[0] else None)])

    def forms(self, index: int) -> list[Document]:
        """The documents that a row may become, one a task, where nothing is joined with it, follows it, or is drawn
        among rows that say the same."""
        row = self.rows[index]
        return [row] if isinstance(row, Document) else [build_document(task, row) for task in self.tasks]

    def lengths(self) -> np.ndarray:
        """Tokens of the longest stream of each document of this epoch, as `collate` will make it: a tower's segments
        one behind the other, each with BOS and EOS; int64 [rows]. Of encoded rows; where they are prepared, only their
        stored lengths are read, but of those that are joined."""
        streams, whole = self._streams
        longest = np.stack(list(streams.values())).max(axis=0)  # of whole documents
        numbers, alone = self._drawn()
        for number, task in enumerate(self.tasks):
            mine, times = ~whole & (numbers == number), Counter(task.modalities)
            if mine.any():
                longest[mine] = np.stack([times[m] * streams[m][mine] for m in times]).max(axis=0)
        for index in np.flatnonzero(~whole & ~alone).tolist():
            longest[index] = self._longest(self._draw(index))
        return longest

    @cached_property
    def _streams(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return stream_lengths(self.rows)

    def _drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """The task of each row, int64 [rows], and whether its document is the row's alone, bool [rows]: nothing is
        joined, follows, or says the same. As `_draw`, for all rows at once."""
        several = len(self.rows) > 1
        twins = np.zeros((len(self.tasks), len(self.rows)), bool)
        for number, by_modality in enumerate(self._twins):
            for groups in by_modality.values():
                twins[number, list(groups)] = True
        joins, follows = several and max(self._join, default=0) > 0, several and self.interleave > 0
        alike = len({tuple(sorted(task.modalities)) for task in self.tasks}) <= 1
        numbers, alone = np.zeros(len(self.rows), np.int64), np.ones(len(self.rows), bool)
        if self.tasks and (joins or follows or not alike or twins.any()):
            chances = iter(first_randoms((self.seed, self.epoch), len(self.rows), joins + 1 + follows))
            if joins:
                alone &= next(chances) >= max(self._join)
            numbers = self._chosen(next(chances))
            alone &= ~twins[numbers, np.arange(len(self.rows))]
            if follows:
                alone &= next(chances) >= self.interleave
        return numbers, alone

    def _chosen(self, chance: Any) -> Any:
        """The task at a number from 0 to 1, or one at each of several."""
        shares = self._probabilities.cumsum()
        return (shares / shares[-1]).searchsorted(chance, side="right")

    def _draw(self, index: int) -> list[_Part]:
        """What makes up the document of a row in this epoch."""
        draw = np.random.default_rng((self.seed, self.epoch, index))
        parts = [self._part(index, draw)]
        if len(self.rows) > 1 and draw.random() < self.interleave:
            other = self._another(index, draw)
            if not is_document(self.rows, other):
                parts.append(self._part(other, draw))
        return parts

    def _another(self, index: int, draw: np.random.Generator) -> int:
        return (index + 1 + int(draw.integers(len(self.rows) - 1))) % len(self.rows)

    def _part(self, index: int, draw: np.random.Generator) -> _Part:
        if not self.tasks:
            raise ValueError(f"tasks: row {index} is no whole document, and there are no tasks to make one")
        chance, partner = 1.0, None
        if (most := max(self._join)) and len(self.rows) > 1 and (chance := draw.random()) < most:
            partner = self._another(index, draw)
        number = int(self._chosen(draw.random()))
        if partner is not None and (chance >= self._join[number] or is_document(self.rows, partner)):
            partner = None
        task, twins = self.tasks[number], dict[str, list[int]]()
        for modality, groups in self._twins[number].items():
            others = [i for i in groups.get(index, ()) if i != index]
            wanted = min(len(others), task.modalities.count(modality) - 1)
            twins[modality] = draw.choice(others, wanted, replace=False).tolist() if wanted else []
        return _Part(task, index, partner, twins)

    def _build(self, part: _Part, row: Row | None = None) -> Document:
        row = self.rows[part.row] if row is None else row  # type: ignore[assignment]
        if part.partner is not None:
            row = join_rows(row, self.rows[part.partner], self.how)  # type: ignore[arg-type]
        twins = {modality: [self.rows[i] for i in others] for modality, others in part.twins.items()}
        return build_document(part.task, row, twins)  # type: ignore[arg-type]

    def _longest(self, parts: Sequence[_Part]) -> int:
        """Tokens of the longest stream of a document of these parts."""
        streams, _ = self._streams
        found: Counter[str] = Counter()
        for part in parts:
            if part.partner is not None:  # words that are joined are encoded anew
                for segment in self._build(part):
                    found[segment.modality] += len(segment.ids or []) + 2
                continue
            for modality, times in Counter(part.task.modalities).items():
                sources = [part.row, *part.twins.get(modality, ())]
                found[modality] += sum(int(streams[modality][sources[n % len(sources)]]) for n in range(times))
        return max(found.values())


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


def joiners(codecs: Mapping[str, Codec], modalities: Iterable[str]) -> dict[str, Joiner]:
    """How two segments become one: words behind words with a space between, sound behind sound token by token.

    Args:
        codecs: by modality. modalities: those to be joined.

    Raises:
        ValueError: for a modality that cannot be joined: it has no codec, or neither words nor time, as a picture.
    """
    found: dict[str, Joiner] = {}
    for name in modalities:
        codec = codecs.get(name)
        if isinstance(codec, TextCodec):
            found[name] = partial(_join_text, codec)
        elif codec is not None and codec.rate is not None:
            found[name] = _join_ids
        else:
            raise ValueError(
                f"training.join: two rows of modality {name!r} cannot be joined end to end: its codec has neither "
                "words nor time; leave join out"
            )
    return found


def join_rows(first: Row, second: Row, how: Mapping[str, Joiner]) -> Row:
    """One encoded row of two: every modality of `how` that both have."""
    return {name: join(first[name], second[name]) for name, join in how.items() if name in first and name in second}


def _join_ids(first: Segment, second: Segment) -> Segment:
    return Segment(first.modality, ids=TokenIds(np.concatenate([first.ids or [], second.ids or []]).astype(np.int32)))


def _join_text(codec: TextCodec, first: Segment, second: Segment) -> Segment:
    """Encoded anew: a word's tokens may depend on the space before it."""
    texts = [s.value if isinstance(s.value, str) else codec.decode([s.ids or []])[0] for s in (first, second)]
    value = " ".join(texts)
    return Segment(first.modality, value=value, ids=codec.encode([value])[0])
