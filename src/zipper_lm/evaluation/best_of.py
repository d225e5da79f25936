"""Best of n, as the paper speaks (arXiv 2405.18669): several samples, of which the one that is heard best is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zipper_lm.data.document import Document, Segment
from zipper_lm.evaluation.judges import Judge, can_be_judged, suits, transcribe
from zipper_lm.evaluation.word_error_rate import Normaliser, normalise, word_error_rate
from zipper_lm.generation.writer import Modalities


class Heard:
    """Chooses, for `generate(choose=...)`, the candidate that a judge understands best: the lowest word error rate
    against the last text of the document before it, whether that was given or written; among equals, and where there
    is no such text or nothing to judge, the one that the model gives the highest probability.

    Args:
        model: that writes; its codecs say what the judge can judge. judge: hears or sees candidates.
        clean: normalises what is compared.
    """

    def __init__(self, model: Modalities, judge: Judge, clean: Normaliser = normalise) -> None:
        self.codecs, self.judge = (model.processor.codecs if model.processor is not None else {}), judge
        self.clean = clean

    def __call__(self, documents: Sequence[Document], candidates: Sequence[Sequence[Segment]]) -> list[int]:
        """The number of a candidate for each document; those to be judged have values."""
        said = [self._said(d) if self._judges(row[0].modality) else "" for d, row in zip(documents, candidates)]
        values = [c.value for text, row in zip(said, candidates) if text for c in row]
        heard = iter(transcribe(self.judge, values, self.clean) if values else [])
        numbers = []
        for text, row in zip(said, candidates):
            errors = [word_error_rate([text], [next(heard)], self.clean).wer if text else 0.0 for _ in row]
            numbers.append(min(range(len(row)), key=lambda i, e=errors, r=row: (e[i], -r[i].score)))  # type: ignore[misc]
        return numbers

    def _judges(self, name: str) -> bool:
        codec = self.codecs.get(name)
        return codec is not None and can_be_judged(codec) and suits(self.judge, codec)

    def _said(self, document: Document) -> str:
        """The words of the last text; none if there is none."""
        for segment in reversed(document.segments):
            if segment.modality == "text":
                text = segment.value
                if text is None and "text" in self.codecs:
                    text = self.codecs["text"].decode([segment.ids or []])[0]
                return text if isinstance(text, str) and self.clean(text) else ""
        return ""


def sampled(settings: Mapping[str, Any], names: Iterable[str], samples: int, by: str | None = None) -> dict[str, Any]:
    """Settings with so many samples of some modalities.

    Args:
        by: which of them goes on, as the setting ``best_by`` says it; `None` leaves that as it is.

    Raises:
        ValueError: for less than one sample.
    """
    if samples < 1:
        raise ValueError(f"best of {samples}: at least 1 sample is needed")
    if samples == 1:
        return dict(settings)
    more = {"do_sample": True, "num_return_sequences": samples} | ({"best_by": by} if by is not None else {})
    return {**settings, **{name: {**settings.get(name, {}), **more} for name in names}}
