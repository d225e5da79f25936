"""Document and Segment: the one type that data sets, collator, model and generation share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Segment:
    """A stretch of one modality.

    Args:
        modality: name of the tower that reads and writes it, such as ``"text"``.
        value: raw value for the modality's codec (a string, a waveform, a path, ...), `None` if only `ids` are known.
        ids: token ids without BOS and EOS, or `None` until a codec has encoded `value`.
        target: whether the loss counts this segment's tokens (ids and EOS).
        labels: what the loss expects in place of `ids`, one for one, where training shows a tower other ids than those
            it shall write; `None`: the ids themselves.
    """

    modality: str
    value: Any = None
    ids: list[int] | None = None
    target: bool = False
    labels: list[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.modality, str) or not self.modality:
            raise ValueError(f"segment.modality must be a non-empty string, got {self.modality!r}")
        if self.value is None and self.ids is None:
            raise ValueError(f"segment of modality {self.modality!r} has neither value nor ids")
        if self.ids is not None:
            self.ids = [int(i) for i in self.ids]
        if self.labels is not None and len(self.labels) != len(self.ids or []):
            raise ValueError(
                f"segment of modality {self.modality!r} has {len(self.labels)} labels for {len(self.ids or [])} ids"
            )


@dataclass
class Document:
    """Segments in reading order. Accepts `Segment`s or `(modality, value)` pairs.

    Example:
        >>> Document([("speech", "three.wav"), ("text", "three")])  # doctest: +SKIP
    """

    segments: list[Segment] = field(default_factory=list)

    def __init__(self, segments: Iterable[Segment | tuple[str, Any]] = ()) -> None:
        self.segments = [s if isinstance(s, Segment) else Segment(*s) for s in segments]

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


def check_modalities(documents: Sequence[Document], known: Sequence[str]) -> None:
    """Raise `ValueError` for the first segment whose modality is not among `known`."""
    for number, document in enumerate(documents):
        for segment in document:
            if segment.modality not in known:
                raise ValueError(
                    f"document {number}: unknown modality {segment.modality!r}; this model has {sorted(known)}"
                )
