"""Document and Segment: the one type that data sets, collator, model and generation share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from zipper_lm.data.token_ids import TokenIds


@dataclass
class Segment:
    """A stretch of one modality.

    Args:
        modality: name of the tower that reads and writes it, such as ``"text"``.
        value: raw value for the modality's codec (a string, a waveform, a path, ...), `None` if only `ids` are known.
        ids: token ids without BOS and EOS, or `None` until a codec has encoded `value`. A list; of the rows of a data
            set, `TokenIds`.
        target: whether the loss counts this segment's tokens (ids and EOS).
        labels: what the loss expects in place of `ids`, one for one, where training shows a tower other ids than those
            it shall write; `None`: the ids themselves.
        logprobs: of a written segment, if asked for: the natural logarithm of the probability of each of its ids, and
            of EOS where it ended with it.
        candidates: of a written segment that was chosen among several: all of them, as they were drawn.

    Raises:
        ValueError: without a modality, or with neither value nor ids; for ids that are no numbers, or labels of another
            length.
    """

    modality: str
    value: Any = None
    ids: Sequence[int] | None = None
    target: bool = False
    labels: Sequence[int] | None = None
    logprobs: list[float] | None = field(default=None, repr=False)
    candidates: list[Segment] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.modality, str) or not self.modality:
            raise ValueError(f"segment.modality must be a non-empty string, got {self.modality!r}")
        if self.value is None and self.ids is None:
            raise ValueError(f"segment of modality {self.modality!r} has neither value nor ids")
        if isinstance(self.ids, list) and set(map(type, self.ids)) <= {int}:
            self.ids = list(self.ids)
        elif self.ids is not None and not isinstance(self.ids, TokenIds):
            try:
                ids = [int(i) for i in self.ids]
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"segment of modality {self.modality!r}: ids must be whole numbers: {error}"
                ) from error
            if wrong := [given for i, given in zip(ids, self.ids) if i != given]:  # halves, and digits in a text
                raise ValueError(f"segment of modality {self.modality!r}: ids must be whole numbers, got {wrong[0]!r}")
            self.ids = ids
        if self.labels is not None and len(self.labels) != len(self.ids or []):
            raise ValueError(
                f"segment of modality {self.modality!r} has {len(self.labels)} labels for {len(self.ids or [])} ids"
            )

    @property
    def score(self) -> float:
        """The sum of `logprobs`. Raises `ValueError` if they were not asked for."""
        if self.logprobs is None:
            raise ValueError(f"segment of modality {self.modality!r} has no logprobs; output_scores asks for them")
        return sum(self.logprobs)


@dataclass
class Document:
    """Segments in reading order. Accepts `Segment`s or `(modality, value)` pairs.

    Raises:
        ValueError: for anything else.

    Example:
        >>> Document([("speech", "three.wav"), ("text", "three")])  # doctest: +SKIP
    """

    segments: list[Segment] = field(default_factory=list)

    def __init__(self, segments: Iterable[Segment | tuple[str, Any]] = ()) -> None:
        if isinstance(segments, str | bytes) or not isinstance(segments, Iterable):
            raise ValueError(f"a document is a list of segments, got {segments!r}")
        self.segments = [as_segment(s) for s in segments]

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> Segment:
        return self.segments[index]

    @property
    def modalities(self) -> list[str]:
        """The modality of each segment, in reading order."""
        return [s.modality for s in self.segments]

    def last(self, modality: str) -> Segment:
        """The last segment of a modality. Raises `ValueError` if there is none."""
        for segment in reversed(self.segments):
            if segment.modality == modality:
                return segment
        raise ValueError(f"document has no segment of modality {modality!r}; it has {self.modalities}")


def as_segment(given: Segment | tuple[str, Any]) -> Segment:
    """A segment, or one of ``(modality, value)``. Raises `ValueError` for anything else."""
    if isinstance(given, Segment):
        return given
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError(f"a segment is a Segment or (modality, value), got {given!r}")
    return Segment(*given)


def check_modalities(documents: Sequence[Document], known: Sequence[str]) -> None:
    """Raise `ValueError` for what is no document, and for the first segment whose modality is not among `known`."""
    if isinstance(documents, Document):
        raise ValueError("documents: this is one Document, a list of them is needed")
    for number, document in enumerate(documents):
        if not isinstance(document, Document):
            raise ValueError(f"document {number} is a {type(document).__name__}: write Document([(modality, value)])")
        for segment in document:
            if segment.modality not in known:
                raise ValueError(
                    f"document {number}: unknown modality {segment.modality!r}; this model has {sorted(known)}"
                )
