"""What an engine has room for: refused is what would need more rows or tokens than it was made for."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GenerationConfig

from zipper_lm.data.document import Document, Segment
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.generation.candidates import samples_of
from zipper_lm.generation.engine.wishes import not_in_the_step


@dataclass(frozen=True)
class Room:
    """Of one engine.

    Args:
        model: whose documents are written. slots: rows of a step. tokens, memory: of a tower's stream, and of another
            tower's that it reads, at most; `None`: any number.
    """

    model: ZippedTowers
    slots: int
    tokens: int | None
    memory: int | None

    def check(
        self, document: Document, entries: list[str | Segment] | None, settings: dict[str, GenerationConfig]
    ) -> None:
        """Refuse what can never fit, before any work.

        Args:
            document: encoded. entries: what is to be written or comes in between; `None`: as the model chooses.
            settings: by tower.

        Raises:
            ValueError: naming what takes too many rows or is too long, and the limit.
        """
        for name in set(self.model.names) if entries is None else {e for e in entries if isinstance(e, str)}:
            given = settings.get(name)
            if given is not None and not_in_the_step(given) is not None:
                continue  # it is written on the plain path
            scale = None if given is None else given.guidance_scale
            rows = samples_of(given) * (1 if scale in (None, 1) else 2)
            if rows > self.slots:
                raise ValueError(
                    f"settings for {name!r}: its samples take {rows} rows, the engine has slots={self.slots}"
                )
        read = {n: sum(len(s.ids or []) + 2 for s in document if s.modality == n) for n in self.model.names}
        for entry in entries or []:
            if isinstance(entry, Segment):
                read[entry.modality] += len(entry.ids or []) + 2
                continue
            self.check_sizes(entry, read[entry] + 1, settings.get(entry), {n: read[n] for n in read if n != entry})
            read[entry] += 3  # a segment has one token at least

    def check_sizes(self, name: str, size: int, given: GenerationConfig | None, read: dict[str, int]) -> None:
        """Refuse a segment of a tower that does not fit.

        Args:
            name: the tower. size: tokens of its stream so far. given: how it is written. read: tokens of the others.

        Raises:
            ValueError: naming what is too long, and the limit.
        """
        most = 1 if given is None or given.max_new_tokens is None else given.max_new_tokens
        if self.tokens is not None and size + most > self.tokens:
            raise ValueError(
                f"tower {name!r}: {size} tokens are read and up to {most} written, the engine has tokens={self.tokens}"
            )
        for source, count in read.items():
            if self.memory is not None and (name, source) in self.model.layer_pairs and count > self.memory:
                raise ValueError(
                    f"tower {name!r} would read {count} tokens of {source!r}, the engine has memory={self.memory}"
                )
