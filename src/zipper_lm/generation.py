"""Generation: a schedule of modalities, each segment written by its tower's own `generate()`.

While a tower speaks, the other towers' memories are only read: they were projected when their segments were finished.
What a request knows is one explicit `State` (see `reading.py`); nothing is kept on the model, so any number of requests
can run on it at once.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, StoppingCriteria
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer

from zipper_lm.collation import collate
from zipper_lm.document import Document, Segment, check_modalities
from zipper_lm.reading import State, read, visible
from zipper_lm.tower import listening
from zipper_lm.zips import Memory, View

if TYPE_CHECKING:
    from zipper_lm.model import ZipperModel
    from zipper_lm.zips import ZipLayer

Schedule = str | Sequence[str | Segment | tuple[str, Any]]
Settings = Mapping[str, Mapping[str, Any] | GenerationConfig]
MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class StreamedToken:
    """One token as it is written: its tower, its id, and the number of its segment in the document."""

    modality: str
    id: int
    segment: int


def generate(
    model: ZipperModel,
    documents: Sequence[Document],
    schedule: Schedule,
    *,
    settings: Settings | None = None,
    max_segments: int = 8,
    decode: bool = True,
    on_token: Callable[[StreamedToken], bool] | None = None,
) -> list[Document]:
    """Let towers write the next segments of documents.

    Args:
        model: the model.
        documents: what is given; may differ in length and layout. Not changed.
        schedule: what comes next, such as ``["text"]``, ``["text", "speech"]``, also with given segments in between
            (`Segment` or ``(modality, value)``); or ``"auto"``: the model says who speaks next, until it says "done".
        settings: per modality, a `GenerationConfig` or its arguments (`do_sample`, `num_beams`, `max_new_tokens`, ...).
            Default: greedy, 256 new tokens.
        max_segments: with "auto", the most segments to write.
        decode: whether to decode written ids to raw values with the processor's codecs, where it has them.
        on_token: told of every token of a single document as it comes; returns whether to go on.

    Returns:
        New documents: the given segments and the written ones. A written segment ends at EOS or at `max_new_tokens`.

    Raises:
        ValueError: for an unknown modality in documents, schedule or settings, or nothing to do.
    """
    settings = {name: _generation_config(name, given) for name, given in (settings or {}).items()}
    entries = _checked_schedule(model, schedule, settings)
    if not documents:
        return []
    if on_token is not None and len(documents) != 1:
        raise ValueError(f"tokens can be streamed for one document at a time, got {len(documents)}")
    encoded = _encode(model, documents)
    with torch.no_grad():
        if entries is None:
            written = _auto(model, encoded, settings, max_segments, on_token)
        else:
            written = _follow(model, encoded, entries, settings, on_token)
    if decode and model.processor is not None:
        _decode(model, documents, written)
    return written


def _checked_schedule(model: ZipperModel, schedule: Schedule, settings: Settings) -> list[str | Segment] | None:
    for name in settings:
        model.tower(name)
    if schedule == "auto":
        return None
    if isinstance(schedule, str) or not schedule:
        raise ValueError(f'schedule must be "auto" or a non-empty list of modalities, got {schedule!r}')
    entries = [e if isinstance(e, (str, Segment)) else Segment(*e) for e in schedule]
    for entry in entries:
        name = entry.modality if isinstance(entry, Segment) else entry
        if name not in model.names:
            raise ValueError(f"schedule names {name!r}, but the towers are {model.names}")
    given = [e for e in entries if isinstance(e, Segment)]
    coded = iter(_encode(model, [Document(given)])[0]) if given else iter(())
    return [next(coded) if isinstance(e, Segment) else e for e in entries]


def _encode(model: ZipperModel, documents: Sequence[Document]) -> list[Document]:
    """Copies with ids in every segment, each id in its tower's vocabulary."""
    encoded = _with_ids(model, documents)
    for document in encoded:
        for segment in document:
            model.check_ids(segment.modality, min(segment.ids or [0]), max(segment.ids or [0]))
    return encoded


def _with_ids(model: ZipperModel, documents: Sequence[Document]) -> list[Document]:
    if model.processor is not None:
        return model.processor.encode(documents)
    copies = [Document(Segment(s.modality, s.value, s.ids, s.target) for s in d) for d in documents]
    check_modalities(copies, model.names)
    for number, document in enumerate(copies):
        for segment in document:
            if segment.ids is None:
                raise ValueError(
                    f"document {number}: {segment.modality} has a raw value, but the model has no processor"
                )
    return copies


def _decode(model: ZipperModel, given: Sequence[Document], written: Sequence[Document]) -> None:
    assert model.processor is not None
    for name, codec in model.processor.codecs.items():
        new = [s for d, old in zip(written, given) for s in d.segments[len(old) :] if s.modality == name]
        if new and codec is not None:
            for segment, value in zip(new, model.processor.decode(name, [s.ids or [] for s in new])):
                segment.value = value if segment.value is None else segment.value


def _goes_on(cache: Any) -> bool:
    """Whether several tokens can be added to a cache at once, rows that hold only padding included.

    A recurrent state cannot forget the padding it was made to read, and most families step it by single tokens only.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return type(cache) is DynamicCache and not any(isinstance(x, LinearAttentionCacheLayerMixin) for x in cache.layers)


# --- requests --------------------------------------------------------------------------------------------------------


class _Request:
    """Documents that are being written together, and what the towers know of them."""

    def __init__(self, model: ZipperModel, documents: list[Document], zipped: list[bool]) -> None:
        self.model, self.documents, self.zipped = model, documents, zipped
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
            if len(lengths) == 1 and _goes_on(self.state.caches.get(name)):
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
        return collate(documents, self.model.specials, side="left", zipped=self.zipped, towers=towers)

    def append(self, modality: str, rows: Sequence[Sequence[int]], value: Any = None) -> None:
        """Finish a segment in every row."""
        for document, ids in zip(self.documents, rows):
            document.segments.append(Segment(modality, value, list(ids)))
        if modality not in self.pending:
            self.pending.append(modality)

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


def _follow(
    model: ZipperModel,
    documents: list[Document],
    entries: list[str | Segment],
    settings: Settings,
    on_token: Callable[[StreamedToken], bool] | None,
) -> list[Document]:
    """Write the segments of a fixed schedule."""
    later = {e.modality if isinstance(e, Segment) else e for e in entries}
    request = _Request(model, documents, [len(later.union(d.modalities)) > 1 for d in documents])
    stopped = _Stop()
    for entry in entries:
        if isinstance(entry, Segment):
            request.read_pending()
            request.append(entry.modality, [entry.ids or []] * len(documents), entry.value)
        else:
            request.append(entry, _speak(request, entry, settings.get(entry), on_token, stopped))
        if stopped.now:
            break
    return request.documents


def _auto(
    model: ZipperModel,
    documents: list[Document],
    settings: Settings,
    max_segments: int,
    on_token: Callable[[StreamedToken], bool] | None,
) -> list[Document]:
    """Write until the model says "done". Rows that choose different speakers part ways."""
    finished: dict[int, Document] = {}
    stopped = _Stop()
    todo = [(list(range(len(documents))), _Request(model, documents, [True] * len(documents)), 0)]
    while todo:
        rows, request, count = todo.pop()
        choices = request.next_speakers() if count < max_segments and not stopped.now else [None] * len(rows)
        for speaker in dict.fromkeys(choices):
            chosen = [i for i, c in enumerate(choices) if c == speaker]
            if speaker is None:
                finished |= {rows[i]: request.documents[i] for i in chosen}
                continue
            part = request
            if len(chosen) < len(rows):
                part = _Request(model, [request.documents[i] for i in chosen], [True] * len(chosen))
            part.append(speaker, _speak(part, speaker, settings.get(speaker), on_token, stopped))
            todo.append(([rows[i] for i in chosen], part, count + 1))
    return [finished[i] for i in range(len(documents))]


# --- speaking --------------------------------------------------------------------------------------------------------


class _Speaker:
    """Listener of a tower that writes: each new token reads the finished memories."""

    def __init__(self, request: _Request, name: str, past: int) -> None:
        self.model, self.name, state = request.model, name, request.state
        self.device = self.model.tower(name).device
        self.zipped = torch.tensor(request.zipped)
        none = torch.zeros(len(request.documents), 0, dtype=torch.long, device=self.device)
        self.segments = state.segments.get(name, none)
        self.positions = state.positions.get(name, none)
        # The number of the segment being written, in every row.
        self.now = torch.tensor([[len(d)] for d in request.documents], device=self.device)
        self.next = past  # which token of the stream the coming forward begins with
        self.sources: dict[str, Tensor] = {}
        self.zips: dict[int, list[tuple[str, ZipLayer, Memory]]] = {}
        for (reader, source), pairs in self.model.layer_pairs.items():
            if reader == name and source in state.segments:
                self.sources[source] = state.segments[source]
                for k, (layer, _) in enumerate(pairs):
                    memory = state.memories[reader, source][k]
                    self.zips.setdefault(layer, []).append((source, self.model.zip_layer(reader, source, k), memory))
        self.views: dict[str, View] = {}
        self.positions_here = none

    def before(self, depth: int, hidden_states: Tensor) -> Tensor:
        if depth:
            return hidden_states
        rows, new = len(self.now), hidden_states.shape[1]
        start, self.next = self.next, self.next + new
        known = self.segments.shape[1]
        index = torch.arange(start, start + new, device=self.device)
        old = index[index < known]
        tail = (index[index >= known] - known).expand(rows, -1)
        segments = torch.cat([self.segments[:, old], self.now.expand(-1, tail.shape[1])], 1)
        self.positions_here = torch.cat([self.positions[:, old], tail], 1)
        repeats = len(hidden_states) // rows
        self.views = {}
        for source, source_segments in self.sources.items():
            self.views[source] = View.of(visible(segments, source_segments).repeat(1, repeats, 1))
        return self.model.project_input(self.name, hidden_states, self.zipped.repeat_interleave(repeats))

    def after(self, depth: int, hidden_states: Tensor) -> Tensor:
        zips = self.zips.get(depth)
        if not zips:
            return hidden_states
        rows = len(self.now)
        # Beams of one document read the same memory: they become more queries of one row, and nothing is copied.
        folded = hidden_states.reshape(rows, -1, hidden_states.shape[-1])
        positions = self.positions_here.repeat(1, len(hidden_states) // rows)
        result = folded
        for source, zip_layer, memory in zips:
            result = result + zip_layer(folded, positions, memory, self.views[source])
        return result.reshape(hidden_states.shape)


class _Stop(StoppingCriteria):
    """Ends every row as soon as `now` is set."""

    def __init__(self) -> None:
        self.now = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.now, dtype=torch.bool, device=input_ids.device)


class _Place(StoppingCriteria):
    """Ends nothing; tells a speaker after each step with which token the next forward begins.

    Counting forwards would not do: assisted decoding steps back behind tokens that were not accepted.
    """

    def __init__(self, speaker: _Speaker) -> None:
        self.speaker = speaker

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.speaker.next = input_ids.shape[1] - 1  # the newest token has not been read
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _TokenStreamer(BaseStreamer):
    """Hands each new token to a callback."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell, self.prompt = tell, True

    def put(self, value: Tensor) -> None:
        if self.prompt:  # transformers puts the prompt first
            self.prompt = False
            return
        for token in value.reshape(-1).tolist():
            self.tell(token)

    def end(self) -> None:
        """Nothing is held back."""


def _speak(
    request: _Request,
    name: str,
    settings: Mapping[str, Any] | GenerationConfig | None,
    on_token: Callable[[StreamedToken], bool] | None,
    stop: _Stop,
) -> list[list[int]]:
    """One segment in every row, as content ids."""
    request.read_pending()
    model, state, documents = request.model, request.state, request.documents
    tower, special = model.tower(name), model.specials[name]
    batch = collate(
        [Document([*d, Segment(name, ids=[])]) for d in documents],
        model.specials,
        side="left",
        towers=[name],
        open_last=True,
    )[name]
    ids, mask = batch["input_ids"].to(tower.device), batch["attention_mask"].to(tower.device)
    given = _generation_config(name, settings)
    kwargs: dict[str, Any] = {}
    past = 0
    # A cache of another kind, and assisted decoding (whose first step takes the cache for empty), start from nothing:
    # the tower's own prefix is read again then.
    anew = given.cache_implementation or given.get_generation_mode() is GenerationMode.ASSISTED_GENERATION
    if tower.cache_name == "past_key_values" and not anew and _goes_on(state.caches.get(name)):
        past = state.segments[name].shape[1]
        kwargs["past_key_values"] = cache = copy.deepcopy(state.caches[name])  # generate() writes into it
        if (given.num_beams or 1) > 1:  # and repeats what it is given for every beam, but not the cache
            cache.batch_repeat_interleave(given.num_beams)
        assert past == ids.shape[1] - 1, "the cache holds the tower's stream up to BOS"
    if on_token is not None:
        number = len(documents[0])

        def tell(token: int) -> None:
            if token != special.eos and not stop.now:
                stop.now = not on_token(StreamedToken(name, token, number))

        kwargs["streamer"] = _TokenStreamer(tell)
    given.bos_token_id, given.eos_token_id, given.pad_token_id = special
    unwritten = {special.bos, special.pad} - {special.eos}
    given.disable_compile = True  # a compiled forward cannot ask a context variable who listens
    given.suppress_tokens = sorted(unwritten.union(given.suppress_tokens or ()))
    speaker = _Speaker(request, name, past)
    with listening(tower.layers, speaker):
        output = tower.backbone.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=given,
            stopping_criteria=[stop, _Place(speaker)],
            **kwargs,
        )
    sequences = output if isinstance(output, Tensor) else output.sequences
    written = sequences[:, ids.shape[1] :].tolist()
    return [row[: row.index(special.eos)] if special.eos in row else row for row in written]


def _generation_config(name: str, settings: Mapping[str, Any] | GenerationConfig | None) -> GenerationConfig:
    """A copy to be written to, with our defaults."""
    if isinstance(settings, GenerationConfig):
        config = copy.deepcopy(settings)
    else:
        if unknown := sorted(set(settings or {}) - set(vars(GenerationConfig()))):
            raise ValueError(f"settings for {name!r}: unknown {unknown}; see transformers.GenerationConfig")
        config = GenerationConfig(**{"do_sample": False, **(settings or {})})
    if config.max_new_tokens is None and config.max_length in (None, 20):
        config.max_new_tokens = MAX_NEW_TOKENS
    if config.num_return_sequences not in (None, 1):
        raise ValueError(
            f"settings for {name!r}: num_return_sequences={config.num_return_sequences}, but a document has one next "
            "segment"
        )
    return config


def stream(
    model: ZipperModel, document: Document, schedule: Schedule, **kwargs: Any
) -> Generator[StreamedToken, None, Document]:
    """Write as `generate` does, for one document, and yield each token as it comes.

    The work is done in a thread of its own. The finished document is the value of the iterator's `StopIteration`
    (``document = yield from stream(...)``). Closing the iterator early stops the writing.
    """
    tokens: queue.Queue[StreamedToken | None] = queue.Queue()
    closed = threading.Event()
    result: list[Document] = []
    failure: list[BaseException] = []

    def on_token(token: StreamedToken) -> bool:
        tokens.put(token)
        return not closed.is_set()

    def work() -> None:
        try:
            result.extend(generate(model, [document], schedule, on_token=on_token, **kwargs))
        except BaseException as error:
            failure.append(error)
        finally:
            tokens.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (token := tokens.get()) is not None:
            yield token
    finally:
        closed.set()
        thread.join()
    if failure:
        raise failure[0]
    return result[0]
