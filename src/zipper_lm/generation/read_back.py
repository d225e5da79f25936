"""Best of n by the model's own reading: of several samples the one goes on that it reads best what it was to say from.

A model that reads both ways can check what it writes, as a speech synthesiser's samples are reranked by a recogniser
(Tortoise, arXiv 2305.07243, section 3: by CLVP), but with no other model. Of text before speech, a sample's measure is
the log-probability that the model gives to the text, EOS included, after the sample alone (one pass for each sample,
over a document of both), and the mean log-probability of the sample's own tokens, which tells clear samples from others
where both are read well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import GenerationConfig

from zipper_lm.data.collation import collate
from zipper_lm.data.document import Document, Segment
from zipper_lm.fusion.groups import read_by_group
from zipper_lm.fusion.loss import targets
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import read
from zipper_lm.generation.candidates import logprobs_at, samples_of
from zipper_lm.generation.settings import BEST_BY, READING
from zipper_lm.utils.products import quick_layers


def reads_back(settings: GenerationConfig | None) -> bool:
    """Whether the model's own reading chooses among several samples."""
    return samples_of(settings) > 1 and getattr(settings, BEST_BY, None) == READING


def check_reads_back(model: ZippedTowers, settings: Mapping[str, GenerationConfig]) -> None:
    """Raise `ValueError` for a modality that is to be chosen by reading, and that no tower reads."""
    for name, own in settings.items():
        if reads_back(own) and not any(source == name for _, source in model.layer_pairs):
            raise ValueError(f"settings for {name!r}: {BEST_BY}={READING!r}, but no tower reads {name!r}: no zip")


def fluency(candidate: Segment) -> float:
    """Mean log-probability of its tokens, EOS included where it ended; 0 for one that ended before any could."""
    return candidate.score / max(1, len(candidate.logprobs or ()))


class ReadBack:
    """Chooses among candidates, for `pick`, by their ids alone.

    Args:
        model: that wrote them. name: their modality. documents: what comes before, not changed.

    Raises:
        ValueError: for a document in which nothing comes before that is read from `name`.
    """

    def __init__(self, model: ZippedTowers, name: str, documents: Sequence[Document]) -> None:
        self.model, self.name = model, name
        self.said = [self._said(document) for document in documents]

    def _said(self, document: Document) -> Segment:
        """The last segment that its tower reads from candidates, or would."""
        for segment in reversed(document.segments):
            if (segment.modality, self.name) in self.model.layer_pairs:
                return segment
        raise ValueError(
            f"settings for {self.name!r}: {BEST_BY}={READING!r} needs something before {self.name!r} that is read from "
            f"it; there is {document.modalities or 'nothing'}, and {self.name!r} is read by "
            f"{sorted(reader for reader, source in self.model.layer_pairs if source == self.name)}"
        )

    @torch.no_grad()
    def __call__(self, documents: Sequence[Document], candidates: Sequence[Sequence[Segment]]) -> list[int]:
        """The number of a candidate for each document; candidates have log-probabilities."""
        read = zip(*(self.log_probabilities(column) for column in zip(*candidates)))
        return [
            max(range(len(row)), key=[value + fluency(c) for value, c in zip(values, row)].__getitem__)
            for values, row in zip(read, candidates)
        ]

    def log_probabilities(self, candidates: Sequence[Segment]) -> list[float]:
        """Natural logarithms of the probabilities of what was to be said, after one candidate for each document."""
        found = [0.0] * len(candidates)
        for reader in dict.fromkeys(s.modality for s in self.said):
            rows = [row for row, said in enumerate(self.said) if said.modality == reader]
            for row, value in zip(rows, self._of(reader, [candidates[r] for r in rows], [self.said[r] for r in rows])):
                found[row] = value
        return found

    def _of(self, reader: str, candidates: Sequence[Segment], said: Sequence[Segment]) -> list[float]:
        documents = [
            Document([Segment(self.name, ids=c.ids), replace(s, value=None, target=True, labels=None)])
            for c, s in zip(candidates, said)
        ]
        batch = collate(documents, self.model.specials)
        width = max(self.model.tower(name).hidden_size for name in batch)
        with quick_layers(max(stream["input_ids"].numel() for stream in batch.values()), width):
            reading = (read_by_group if self.model.config.groups else read)(self.model, batch)
        logits = reading.logits[reader]
        return [sum(row) for row in logprobs_at(logits, targets(batch[reader], logits.shape[-1]).to(logits.device))]
