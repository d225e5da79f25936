"""A request: documents that are being written together, and what the towers have read of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from zipper_lm.data.collation import ABSENT, Batch, collate
from zipper_lm.data.document import Document, Segment
from zipper_lm.fusion.loss import targets
from zipper_lm.fusion.reading import State, read
from zipper_lm.generation.candidates import Choose, Written, candidates_of, logprobs_at, pick, wants_scores
from zipper_lm.generation.read_back import ReadBack, reads_back
from zipper_lm.generation.segment import Stop, StreamedToken, write_segment
from zipper_lm.utils.products import quick_layers

if TYPE_CHECKING:
    from zipper_lm.data.processor import ZipperProcessor
    from zipper_lm.fusion.network import ZippedTowers


class Request:
    """Documents that are being written together, and what the towers know of them.

    Args:
        model: the model. documents: what is there so far; segments are added. involved: the towers that take part, or
            will, in each. numbers: of the documents in their call; `None`: from 0 on.
    """

    def __init__(
        self,
        model: ZippedTowers,
        documents: list[Document],
        involved: list[set[str]],
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.model, self.documents, self.involved = model, documents, involved
        self.numbers = list(range(len(documents)) if numbers is None else numbers)
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
            self.read(self._collate(self.documents, whole))
        for name in rows.keys() - set(whole):
            batch = self._collate(rows[name], [name])
            batch[name]["segments"] += torch.tensor([[len(d) - 1] for d in self.documents])
            self.read(batch)
        self.pending = []

    def read(self, batch: Batch) -> None:
        """Read tokens that go on from what was read."""
        width = max(self.model.tower(name).hidden_size for name in batch)
        with quick_layers(max(stream["input_ids"].numel() for stream in batch.values()), width):
            read(self.model, batch, self.state)

    def _collate(self, documents: list[Document], towers: list[str]) -> Batch:
        return collate(documents, self.model.specials, side="left", involved=self.involved, towers=towers)

    def append(self, modality: str, rows: Sequence[Sequence[int]], value: Any = None) -> None:
        """Finish a segment in every row."""
        for document, ids in zip(self.documents, rows):
            document.segments.append(Segment(modality, value, list(ids)))
        self._is_pending(modality)

    def _is_pending(self, name: str) -> None:
        if name not in self.pending:
            self.pending.append(name)

    def write(
        self,
        name: str,
        settings: GenerationConfig | None,
        on_token: Callable[[StreamedToken], bool] | None,
        stop: Stop,
        choose: Choose | None = None,
    ) -> None:
        """Read what is pending, write a segment of `name` in every row, and append it.

        Args:
            name, settings, on_token, stop: see `segment.write_segment`. choose: see `candidates.pick`; it goes before
                what settings say.
        """
        choose, processor = self.chooser(name, settings, choose)
        self.read_pending()
        given = self.model, self.state, self.documents, self.involved
        rows = write_segment(*given, name, settings, on_token, stop, self.numbers)
        candidates = candidates_of(name, rows)
        if wants_scores(settings):
            for number, column in enumerate(zip(*rows)):
                for row, logprobs in zip(candidates, self._logprobs(name, column)):
                    row[number].logprobs = logprobs
        for document, segment in zip(self.documents, pick(self.documents, candidates, choose, processor)):
            document.segments.append(segment)
        self._is_pending(name)

    def chooser(
        self, name: str, settings: GenerationConfig | None, choose: Choose | None
    ) -> tuple[Choose | None, ZipperProcessor | None]:
        """What chooses among the samples of the next segment, and what decodes them before: the model reads ids.

        Raises:
            ValueError: if the model is to read them, and cannot.
        """
        if choose is None and reads_back(settings):
            return ReadBack(self.model, name, self.documents), None
        return choose, self.model.processor

    def _logprobs(self, name: str, samples: Sequence[Written]) -> list[list[float]]:
        """What the model gives one sample of every row, token by token: they are read as segments that are finished,
        and what is read of them is forgotten."""
        state, new = self.state.fork(name), [Segment(name, ids=sample.ids, target=True) for sample in samples]
        if state.goes_on(self.model.tower(name)):
            batch = collate([Document([s]) for s in new], self.model.specials, involved=self.involved, towers=[name])
            numbers, here = torch.tensor([[len(d)] for d in self.documents]), batch[name]["segments"]
            batch[name]["segments"] = torch.where(here == ABSENT, ABSENT, numbers)
        else:
            state.forget(name)
            given = [[replace(s, target=False) for s in d] for d in self.documents]
            batch = self._collate([Document([*d, s]) for d, s in zip(given, new)], [name])
        logits = read(self.model, batch, state).logits[name]
        found = logprobs_at(logits, targets(batch[name], logits.shape[-1]).to(logits.device))
        return [row[: len(s.ids) + s.ended] for row, s in zip(found, samples)]

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
