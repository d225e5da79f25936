"""A request: documents that are being written together, and what the towers have read of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from zipper_lm.data.collation import collate
from zipper_lm.data.document import Document, Segment
from zipper_lm.fusion.reading import State, read
from zipper_lm.generation.segment import Stop, StreamedToken, write_segment

if TYPE_CHECKING:
    from zipper_lm.fusion.network import ZippedTowers


class Request:
    """Documents that are being written together, and what the towers know of them.

    Args:
        model: the model. documents: what is there so far; segments are added. involved: the towers that take part, or
            will, in each.
    """

    def __init__(self, model: ZippedTowers, documents: list[Document], involved: list[set[str]]) -> None:
        self.model, self.documents, self.involved = model, documents, involved
        self.state = State()
        self.pending = [n for n in model.names if any(n in d.modalities for d in documents)]

    def read_pending(self) -> None:
        """Read what has not been read. Goes on from a tower's cache if that leaves no padding inside its stream."""
        if not self.pending:
            return
        rows: dict[str, list[Document]] = {}
        for name in self.pending:
            newest = [d.segments[-1:] for d in self.documents]
            lengths = {len(s.ids or []) for segments in newest for s in segments}
            if len(lengths) == 1 and self.state.goes_on(self.model.tower(name)):
                rows[name] = [Document(segments) for segments in newest]
            else:
                self.state.forget(name)
                rows[name] = self.documents
        whole = [n for n, d in rows.items() if d is self.documents]
        if whole:
            read(self.model, self._collate(self.documents, whole), self.state)
        for name in rows.keys() - set(whole):
            batch = self._collate(rows[name], [name])
            batch[name]["segments"] += torch.tensor([[len(d) - 1] for d in self.documents])
            read(self.model, batch, self.state)
        self.pending = []

    def _collate(self, documents: list[Document], towers: list[str]) -> Any:
        return collate(documents, self.model.specials, side="left", involved=self.involved, towers=towers)

    def append(self, modality: str, rows: Sequence[Sequence[int]], value: Any = None) -> None:
        """Finish a segment in every row."""
        for document, ids in zip(self.documents, rows):
            document.segments.append(Segment(modality, value, list(ids)))
        if modality not in self.pending:
            self.pending.append(modality)

    def write(
        self,
        name: str,
        settings: Mapping[str, Any] | GenerationConfig | None,
        on_token: Callable[[StreamedToken], bool] | None,
        stop: Stop,
    ) -> None:
        """Read what is pending, write a segment of `name` in every row, and append it.

        Args:
            name, settings, on_token, stop: see `segment.write_segment`.
        """
        self.read_pending()
        rows = write_segment(self.model, self.state, self.documents, self.involved, name, settings, on_token, stop)
        self.append(name, rows)

    def next_speakers(self) -> list[str | None]:
        """Who speaks next in each row, `None` for done, by the last tower's handover."""
        self.read_pending()
        names = [*self.model.names, None]
        choices = []
        for row, document in enumerate(self.documents):
            if len(document):
                logits = self.state.handover[document[-1].modality][row]
            else:
                logits = self.model.handover_start.detach().clone()
                logits[-1] = -torch.inf  # an empty document is not done
            choices.append(names[int(logits.argmax())])
        return choices
