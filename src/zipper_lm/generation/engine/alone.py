"""A tower that goes on from ids of its own, by itself: the backbone it was before it was zipped, beside documents.

Nothing opens a segment and nothing is read of other towers: a row whose tower is involved with none leaves input
projections and zips out, as the second row of a guided segment does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria

from zipper_lm.data.document import Document, Segment
from zipper_lm.fusion.reading import State
from zipper_lm.generation.candidates import Written
from zipper_lm.generation.engine.wishes import not_in_the_step, wanted_of
from zipper_lm.generation.engine.writing import Apart, Sample, Seats, Terms, Writing, read_alone
from zipper_lm.generation.logits import StopStrings, StopThreshold, Suppression
from zipper_lm.generation.sampling import Draw, SeededDraw, stream_key
from zipper_lm.generation.segment import StreamedToken, TokenStreamer, unwritten_ids
from zipper_lm.generation.settings import SEED, STOP_THRESHOLD


@dataclass(frozen=True, kw_only=True)
class Prompt(Terms):
    """What one tower is to go on from.

    Attributes:
        name: the tower. ids: at least one; read as they are. settings: of what is written.
    """

    name: str
    ids: Sequence[int]
    settings: GenerationConfig

    def write(self) -> Writing:
        """Two segments: the ids that were given, and those that were written."""
        given, known, tower = self.settings, Segment(self.name, ids=list(self.ids)), self.model.tower(self.name)
        if self.fault(self.name, not_in_the_step(given)) is not None:
            ids = yield Apart(lambda: self._write_plainly(given))
            return Document([known, Segment(self.name, ids=ids)])
        stream = torch.tensor(self.ids)
        wanted = wanted_of(self.model, self.name, given, stream, (self.number, 1), self.seed)
        state = State()
        if len(self.ids) > 1:
            state.caches[self.name] = yield from read_alone(tower, stream[None, :-1], self.chunk)
        samples: list[Sample] = yield Seats(
            name=self.name,
            wanted=wanted,
            state=state,
            stream=stream,
            involved=torch.zeros(len(self.model.names), dtype=torch.bool),
            bare=None,
            on_token=self._tell,
        )
        self.leave(samples)
        return Document([known, Segment(self.name, ids=samples[0].ids)])

    def _tell(self, token: int) -> None:
        self.on_token(StreamedToken(self.name, token, 1))

    def _write_plainly(self, given: GenerationConfig) -> list[int]:
        """With the backbone's own `generate()`."""
        tower, special = self.model.tower(self.name), self.model.specials[self.name]
        if getattr(given, STOP_THRESHOLD) is not None and special.eos >= tower.head_size:
            raise ValueError(f"settings for {self.name!r}: {STOP_THRESHOLD} needs the probability of EOS")
        ids = torch.tensor([list(self.ids)], device=tower.device)
        codec = self.model.processor.codecs.get(self.name) if self.model.processor is not None else None
        stops: list[StoppingCriteria] = [self.stop, *StopStrings.taken_from(given, self.name, codec, ids.shape[1])]
        processors: list[Any] = [Suppression(unwritten_ids(self.model, self.name, given), tower.device)]
        if (threshold := getattr(given, STOP_THRESHOLD)) is not None:
            processors.append(StopThreshold(threshold, special.eos))
        if given.do_sample and (seed := getattr(given, SEED)) is not None:
            key = stream_key(*torch.tensor([[seed, self.number, 1, 0]], device=tower.device).unbind(1))
            processors.append(SeededDraw(key, Draw.of(given), ids.shape[1]))
            given.temperature, given.top_k, given.top_p, given.min_p = 1.0, 0, 1.0, None
        given.bos_token_id, given.eos_token_id, given.pad_token_id = special
        given.use_cache, given.suppress_tokens, given.output_scores = tower.interface.writing != "uncached", None, None
        given.disable_compile = True

        def heard(token: StreamedToken) -> bool:
            self._tell(token.id)
            return not self.stop.now

        with torch.no_grad():
            written = tower.backbone.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=given,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=stops,
                synced_gpus=False,  # as in `write_segment`
                streamer=TokenStreamer(self.name, 1, special.eos, heard, self.stop),
            )
        return list(Written.until(special.eos, written[0, ids.shape[1] :].tolist()).ids)
