"""A segment: one tower writes it with its own `generate()`, while it reads the others' finished memories."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer

from zipper_lm.data.collation import collate, involvement
from zipper_lm.data.document import Document, Segment
from zipper_lm.fusion.limits import keep_within
from zipper_lm.fusion.reading import State, visible
from zipper_lm.fusion.tower import listening
from zipper_lm.fusion.zips import Memory, View
from zipper_lm.generation.candidates import Written, samples_of
from zipper_lm.generation.logits import Guidance, StopStrings, StopThreshold, Suppression
from zipper_lm.generation.sampling import Draw, SeededDraw, stream_key
from zipper_lm.generation.settings import SEED, STOP_THRESHOLD, at_fault, generation_config
from zipper_lm.utils.products import quick_layers

if TYPE_CHECKING:
    from zipper_lm.fusion.network import ZippedTowers
    from zipper_lm.fusion.zips import ZipLayer


@dataclass(frozen=True)
class StreamedToken:
    """One token as it is written: its tower, its id, and the number of its segment in the document."""

    modality: str
    id: int
    segment: int


class _Speaker:
    """Listener of a tower that writes: each new token reads the finished memories."""

    def __init__(
        self,
        model: ZippedTowers,
        state: State,
        documents: Sequence[Document],
        involved: Sequence[set[str]],
        name: str,
        past: int,
    ) -> None:
        self.model, self.name = model, name
        self.device = model.tower(name).device
        self.involved = involvement(involved, model.names)
        none = torch.zeros(len(documents), 0, dtype=torch.long, device=self.device)
        self.segments = state.segments.get(name, none)
        self.positions = state.positions.get(name, none)
        # The number of the segment being written, in every row.
        self.now = torch.tensor([[len(d)] for d in documents], device=self.device)
        self.next = past  # which token of the stream the coming forward begins with
        self.has_read = False  # since it was told so
        self.sources: dict[str, Tensor] = {}
        self.zips: dict[int, list[tuple[str, ZipLayer, Memory]]] = {}
        for (reader, source), pairs in model.layer_pairs.items():
            if reader == name and source in state.segments:
                self.sources[source] = state.segments[source]
                for k, (layer, _) in enumerate(pairs):
                    memory = state.memories[reader, source][k]
                    self.zips.setdefault(layer, []).append((source, model.zip_layer(reader, source, k), memory))
        self.views: dict[str, View] = {}
        self.positions_here, self.involved_here = none, self.involved
        # Layers at which nothing happens are left alone: asking at each takes longer than a small one computes.
        self.heard = {0, *self.zips, model.projection_layer(name) or 0}

    def before(self, depth: int, hidden_states: Tensor) -> Tensor:
        if depth == 0:
            self._begin(hidden_states)
        return self.model.project_input(self.name, depth, hidden_states, self.involved_here)

    def _begin(self, hidden_states: Tensor) -> None:
        """A forward begins, with the embeddings of the tokens that it reads."""
        self.has_read = True
        rows, start, known = len(self.now), self.next, self.segments.shape[1]
        self.next = end = start + hidden_states.shape[1]
        tail = torch.arange(max(start, known) - known, max(end, known) - known, device=self.device).expand(rows, -1)
        segments = torch.cat([self.segments[:, start:end], self.now.expand(-1, tail.shape[1])], 1)
        positions = torch.cat([self.positions[:, start:end], tail], 1)
        seen = {source: visible(segments, theirs) for source, theirs in self.sources.items()}
        self.involved_here = self.involved
        # Beams or samples of a document read the same memory: they become queries of one row, and nothing is copied.
        if (repeats := len(hidden_states) // rows) > 1:
            positions, seen = positions.repeat(1, repeats), {s: v.repeat(1, repeats, 1) for s, v in seen.items()}
            self.involved_here = self.involved.repeat_interleave(repeats, 0)
        self.positions_here, self.views = positions, {source: View.of(pairs) for source, pairs in seen.items()}

    def after(self, depth: int, hidden_states: Tensor) -> Tensor:
        zips = self.zips.get(depth)
        if not zips:
            return hidden_states
        folded = hidden_states.reshape(len(self.now), -1, hidden_states.shape[-1])
        result = folded
        for source, zip_layer, memory in zips:
            result = result + zip_layer(folded, self.positions_here, memory, self.views[source])
        return result.reshape(hidden_states.shape)


class Stop(StoppingCriteria):
    """Ends every row as soon as `now` is set."""

    def __init__(self) -> None:
        self.now = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.now, dtype=torch.bool, device=input_ids.device)


class _Place(StoppingCriteria):
    """Ends nothing; tells a speaker after each step with which token the next forward begins.

    Counting forwards would not do: assisted decoding steps back behind tokens that were not accepted. Before a forward
    transformers 5.17 asks once more, with tokens that are only proposed: what counts is the first time after a forward.
    Without a cache every forward begins with the first.
    """

    def __init__(self, speaker: _Speaker, cached: bool) -> None:
        self.speaker, self.cached = speaker, cached

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.speaker.has_read:
            self.speaker.next = input_ids.shape[1] - 1 if self.cached else 0  # the newest token has not been read
            self.speaker.has_read = False
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TokenStreamer(BaseStreamer):
    """Tells of each token of one segment as it comes, up to its EOS: proposed tokens may be accepted beyond it.

    Args:
        modality, segment: of the `StreamedToken`s. eos: the id that ends it. on_token: told of each; returns whether to
            go on. stop: set once it says no. offset: what the modality's first id is to the decoder.
    """

    def __init__(
        self,
        modality: str,
        segment: int,
        eos: int,
        on_token: Callable[[StreamedToken], bool],
        stop: Stop,
        offset: int = 0,
    ) -> None:
        self.modality, self.segment, self.eos, self.offset = modality, segment, eos, offset
        self.on_token, self.stop = on_token, stop
        self.prompt, self.ended = True, False

    def put(self, value: Tensor) -> None:
        if self.prompt:  # transformers puts the prompt first
            self.prompt = False
            return
        for token in value.reshape(-1).tolist():
            self.ended |= token == self.eos
            if not self.ended and not self.stop.now:
                self.stop.now = not self.on_token(StreamedToken(self.modality, token - self.offset, self.segment))

    def end(self) -> None:
        """Nothing is held back."""


def unwritten_ids(model: ZippedTowers, name: str, given: GenerationConfig) -> list[int]:
    """Ids within a tower's head that a segment never has: special ones but EOS, those that its codec does not know (a
    tower may have more, rows that were added to make its size a round number), and those that settings suppress."""
    tower, special = model.tower(name), model.specials[name]
    codec = model.processor.codecs.get(name) if model.processor is not None else None
    known = tower.head_size if codec is None else codec.vocab_size
    unwritten = {special.bos, special.pad, *range(known, tower.head_size)} - {special.eos}
    unwritten.update(given.suppress_tokens or ())
    return sorted(i for i in unwritten if 0 <= i < tower.head_size)


def write_segment(
    model: ZippedTowers,
    state: State,
    documents: Sequence[Document],
    involved: Sequence[set[str]],
    name: str,
    settings: Mapping[str, Any] | GenerationConfig | None,
    on_token: Callable[[StreamedToken], bool] | None,
    stop: Stop,
    numbers: Sequence[int] | None = None,
) -> list[list[Written]]:
    """Write one segment in every row, or several candidates for it, with the tower's own `generate()`.

    Args:
        model: the model. state: what the towers have read, which is all of the documents. documents: what is there so
            far; not changed. involved: the towers that take part in each. name: who writes.
        settings: as in `generation.generate`. on_token: told of every token of a single document.
        stop: ends the segment as soon as it is set. numbers: of the documents in their call, for draws from a seed;
            `None`: from 0 on.

    Returns:
        per row, as many candidates as settings ask for.

    Raises:
        ValueError: for settings that are unknown, out of range, or do not go together.
    """
    tower, special = model.tower(name), model.specials[name]
    batch = collate(
        [Document([*d, Segment(name, ids=[])]) for d in documents],
        model.specials,
        side="left",
        towers=[name],
        open_last=True,
    )[name]
    ids, mask = batch["input_ids"].to(tower.device), batch["attention_mask"].to(tower.device)
    given = generation_config(name, settings, special)
    samples = samples_of(given)
    copies = max(given.num_beams or 1, samples)
    writing, cached = tower.interface.writing, tower.interface.cache
    if writing == "wrong":
        raise ValueError(f"tower {name!r} can be read, but not written with: {tower.interface.faults[-1]}")
    if given.use_cache is not False:  # `None` is not as the backbone's config says: Trainer leaves False there
        given.use_cache = writing != "uncached"
    codec = model.processor.codecs.get(name) if model.processor is not None else None
    kwargs: dict[str, Any] = {}
    stops: list[StoppingCriteria] = [stop, *StopStrings.taken_from(given, name, codec, ids.shape[1])]
    past = 0
    # A cache of another kind, assisted decoding (whose first step takes the cache for empty) and a prefix in chunks
    # (which transformers 5.20 still counts from the first token) start from nothing: the tower reads its prefix again.
    anew = given.cache_implementation or given.prefill_chunk_size
    anew = anew or given.get_generation_mode() is GenerationMode.ASSISTED_GENERATION
    if given.use_cache and writing == "handed" and not anew and cached is not None and state.goes_on(tower):
        past = state.segments[name].shape[1]
        kwargs[cached.argument] = cache = copy.deepcopy(state.caches[name])  # generate() writes into it
        if copies > 1:  # and repeats what it is given for each, but not this
            cache.batch_repeat_interleave(copies)
        assert past == ids.shape[1] - 1, "the cache holds the tower's stream up to BOS"
    if on_token is not None:
        kwargs["streamer"] = TokenStreamer(name, len(documents[0]), special.eos, on_token, stop)
    processors: list[LogitsProcessor] = []
    if (threshold := getattr(given, STOP_THRESHOLD, None)) is not None:  # before guidance: it asks the tower itself
        if special.eos >= tower.head_size:
            raise ValueError(
                f"settings for {name!r}: {STOP_THRESHOLD} needs the probability of EOS (id {special.eos}); the tower "
                f"writes ids 0 to {tower.head_size - 1} only: its segments end after max_new_tokens"
            )
        processors.append(StopThreshold(threshold, special.eos))
    if (scale := given.guidance_scale) not in (None, 1):
        given.guidance_scale = None  # transformers' own would run the zipped tower twice
        processors.append(Guidance(tower, scale, mask.repeat_interleave(samples, 0)))
    if tower.position_limit is not None:
        keep_within(f"tower {name!r}", tower.position_limit, mask, given)
    given.bos_token_id, given.eos_token_id, given.pad_token_id = special
    unwritten = unwritten_ids(model, name, given)
    given.suppress_tokens = None  # transformers' own looks through the whole vocabulary at every token
    processors.insert(0, Suppression(unwritten, tower.device))
    if given.do_sample and (seed := getattr(given, SEED, None)) is not None:
        where = [
            [seed, number, len(document), sample]
            for number, document in zip(range(len(documents)) if numbers is None else numbers, documents)
            for sample in range(samples)
        ]
        keys = stream_key(*torch.tensor(where, device=tower.device).unbind(1))
        processors.append(SeededDraw(keys, Draw.of(given), ids.shape[1]))
        given.temperature, given.top_k, given.top_p, given.min_p = 1.0, 0, 1.0, None  # what it leaves is one id
    given.output_scores = None  # log-probabilities are worked out afterwards, by the model's own distribution
    given.disable_compile = True  # a compiled forward cannot ask a context variable who listens
    speaker = _Speaker(model, state, documents, involved, name, past)
    speaking = listening(tower.layers, speaker, heard=speaker.heard)
    with speaking, at_fault(name), quick_layers(len(ids) * copies, tower.hidden_size):
        output = tower.backbone.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=given,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=[*stops, _Place(speaker, given.use_cache)],
            synced_gpus=False,  # under FSDP others would be waited for at every token; but here it is whole
            **kwargs,
        )
    sequences = output if isinstance(output, Tensor) else output.sequences
    written = [Written.until(special.eos, row) for row in sequences[:, ids.shape[1] :].tolist()]
    return [written[i : i + samples] for i in range(0, len(written), samples)]
