"""The writing of one document, as a coroutine: it yields what it waits for, and an engine lets it go on.

It reads in chunks, so that others' steps come between, asks for seats in a tower's step for each segment, and takes
what the step has read into its own state when the segment is done: what is read then are the one or two tokens at its
end that no step has read.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import GenerationConfig

from zipper_lm.data.collation import Batch, collate, involvement, tokens_of
from zipper_lm.data.document import Document, Segment
from zipper_lm.fusion.groups import towers_for
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import State
from zipper_lm.fusion.tower import Tower
from zipper_lm.generation.candidates import Choose, pick
from zipper_lm.generation.engine.choice import Wish
from zipper_lm.generation.engine.step import Step
from zipper_lm.generation.engine.together import pending_tokens
from zipper_lm.generation.engine.wishes import Wanted, not_in_the_step, wanted_of
from zipper_lm.generation.request import Request
from zipper_lm.generation.segment import Stop, StreamedToken
from zipper_lm.generation.settings import generation_config
from zipper_lm.utils.products import quick_layers


@dataclass(frozen=True)
class Pause:
    """Others may go on; so many tokens were read."""

    tokens: int


@dataclass(frozen=True)
class Read:
    """A request of which nothing was read; the engine may read it along with others, or leave it to be read."""

    request: Request


@dataclass(frozen=True)
class Apart:
    """Work for another thread; what it returns is sent back."""

    work: Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Seats:
    """A segment for a tower's step; a `Sample` for each wish is sent back, still in their rows.

    Attributes:
        name: of the tower. wanted: what it asks for. state: what was read of the document. stream: int64, the tower's
            ids so far, BOS included. involved: bool ``[T]``. bare: what the tower alone keeps of the stream before BOS,
            where guidance asks. on_token: told of each id of a single sample.
    """

    name: str
    wanted: Wanted
    state: State
    stream: Tensor
    involved: Tensor
    bare: Any
    on_token: Callable[[int], None]

    @property
    def columns(self) -> int:
        """How many columns a row of it takes."""
        return len(self.stream) + self.wanted.most


@dataclass
class Sample:
    """What one row writes.

    Attributes:
        step, row: where. wish: how. ids: content. logprobs: where they are asked for, EOS included. ended: whether with
            EOS. done: whether nothing more comes.
    """

    step: Step
    row: int
    wish: Wish
    ids: list[int]
    logprobs: list[float]
    ended: bool = False
    done: bool = False


Command: TypeAlias = Pause | Read | Apart | Seats
Writing: TypeAlias = Generator[Command, Any, Document]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """On what terms an engine writes one document.

    Attributes:
        model: the model. number: of the document in its call. seed: of draws, where settings give none. chunk: tokens
            that are read at once. fault: of a tower: why its step is not captured. leave: gives rows back. on_token:
            told of each token. stop: set when nobody wants to hear more.
    """

    model: ZippedTowers
    number: int
    seed: int
    chunk: int
    fault: Callable[[str, str | None], str | None]
    leave: Callable[[list[Sample]], None]
    on_token: Callable[[StreamedToken], None]
    stop: Stop


@dataclass(frozen=True, kw_only=True)
class Order(Terms):
    """What is to be written behind a document.

    Attributes:
        document: with ids. entries: of the schedule; `None` for "auto". settings: by modality. max_segments, choose: as
            in `generate`.
    """

    document: Document
    entries: list[str | Segment] | None
    settings: Mapping[str, GenerationConfig]
    max_segments: int
    choose: Choose | None

    def write(self) -> Writing:
        """Everything; the finished document is returned."""
        if self.entries is None:
            return (yield from self._auto())
        if self.model.config.groups:
            return (yield from self._follow_by_group(self.entries))
        return (yield from self._follow(self.entries))

    def _request(self, document: Document, involved: set[str]) -> Request:
        return Request(self.model, [document], [involved], [self.number])

    def _follow(self, entries: list[str | Segment]) -> Writing:
        later = {e.modality if isinstance(e, Segment) else e for e in entries}
        request = self._request(self.document, later.union(self.document.modalities))
        for number, entry in enumerate(entries):
            if isinstance(entry, Segment):
                yield from self._read(request)
                request.append(entry.modality, [entry.ids or []], entry.value)
            else:
                yield from self._segment(request, entry, goes_on=number + 1 < len(entries))
        return request.documents[0]

    def _follow_by_group(self, entries: list[str | Segment]) -> Writing:
        """See `generation.generate._follow_by_group`."""
        later = {e.modality if isinstance(e, Segment) else e for e in entries}
        document, whole = self.document, later.union(self.document.modalities)
        for entry in entries:
            if isinstance(entry, Segment):
                document.segments.append(replace(entry))
                continue
            earlier = set(document.modalities) - {entry}
            if earlier and not any((entry, source) in self.model.layer_pairs for source in earlier):
                raise ValueError(
                    f"{entry!r} reads none of {sorted(earlier)}: there is no zip; let another write between"
                )
            towers = towers_for(self.model, entry, document.modalities, whole)
            part = Document(s for s in document if s.modality in towers)
            request = self._request(part, whole & towers)
            yield from self._segment(request, entry, goes_on=False, number=len(document))
            document.segments.append(request.documents[0][-1])
        return document

    def _auto(self) -> Writing:
        request = self._request(self.document, set(self.model.names))
        for count in range(self.max_segments):
            yield from self._read(request)
            speaker = request.next_speakers()[0]
            if speaker is None:
                break
            yield from self._segment(request, speaker, goes_on=count + 1 < self.max_segments)
        return request.documents[0]

    def _read(self, request: Request) -> Generator[Command, Any, None]:
        if whole_tokens(request) > self.chunk:
            yield Apart(request.read_pending)
        if request.pending and not request.state.segments and pending_tokens(request) <= self.chunk:
            yield Read(request)
        for tokens in read_in_chunks(request, self.chunk):
            yield Pause(tokens)

    def _segment(
        self, request: Request, name: str, *, goes_on: bool, number: int | None = None
    ) -> Generator[Command, Any, None]:
        """Write one segment. `goes_on`: whether anything is read after it. `number`: of it in the whole document."""
        yield from self._read(request)
        document, special = request.documents[0], self.model.specials[name]
        number = len(document) if number is None else number

        def tell(token: int) -> None:
            self.on_token(StreamedToken(name, token, number))

        given = generation_config(name, self.settings.get(name), special)
        choose, processor = request.chooser(name, given, self.choose)
        if self.fault(name, not_in_the_step(given)) is not None:
            yield Apart(lambda: self._write_plainly(request, name, given, tell))
            return
        ids = [i for s in document if s.modality == name for i in tokens_of(s, special)]
        stream = torch.tensor([*ids, special.bos])
        wanted = wanted_of(self.model, name, given, stream, (self.number, len(document)), self.seed)
        bare = None
        if ids and wanted.wishes[0].guidance != 1.0:
            bare = yield from read_alone(self.model.tower(name), stream[None, :-1], self.chunk)
        samples: list[Sample] = yield Seats(
            name=name,
            wanted=wanted,
            state=request.state,
            stream=stream,
            involved=involvement(request.involved, self.model.names)[0],
            bare=bare,
            on_token=tell,
        )
        # Others sit down while somebody chooses, and the columns go on.
        step, taken = samples[0].step, [s.step.take(s.row) for s in samples] if goes_on else []
        self.leave(samples)
        candidates = [Segment(name, ids=s.ids, logprobs=s.logprobs if s.wish.scored else None) for s in samples]
        segment = candidates[0]
        if len(candidates) > 1:
            before = [Document(document.segments)]
            if choose is None:
                segment = pick(before, [candidates], None, processor)[0]
            else:
                segment = (yield Apart(lambda: pick(before, [candidates], choose, processor)))[0]
            for token in segment.ids or []:
                tell(token)
        document.segments.append(segment)
        if goes_on:
            chosen = next(t for t, c in zip(taken, candidates) if c.ids == segment.ids)
            read_rest(request, name, step.extend(chosen, request.state, number))

    def _write_plainly(self, request: Request, name: str, given: GenerationConfig, tell: Callable[[int], None]) -> None:
        """With the tower's own `generate()`."""
        with torch.no_grad():

            def heard(token: StreamedToken) -> bool:
                tell(token.id)
                return not self.stop.now

            several = (given.num_return_sequences or 1) > 1 or (given.num_beams or 1) > 1
            streamed = None if several else heard
            request.write(name, given, streamed, self.stop, self.choose)
            if streamed is None:
                for token in request.documents[0][-1].ids or []:
                    tell(token)


def whole_tokens(request: Request) -> int:
    """How many tokens are pending that are read at once, as some tower cannot go on by several; 0: chunks will do."""
    caches = [request.model.tower(name).interface.cache for name in request.pending]
    if all(cache is not None and cache.several for cache in caches):
        return 0
    return pending_tokens(request)


def read_alone(tower: Tower, ids: Tensor, size: int) -> Generator[Command, Any, Any]:
    """What a tower keeps of some ids, int64 ``[1, T]``, that it reads by itself; in chunks where it can go on by
    several."""
    known, cache, ids = tower.interface.cache, None, ids.to(tower.device)
    if (known is None or not known.several) and ids.shape[1] > size:
        return (yield Apart(lambda: tower(ids, torch.ones_like(ids), use_cache=True, logits=False)[1]))
    for begin in range(0, ids.shape[1], size):
        part = ids[:, begin : begin + size]
        read = torch.ones(1, begin + part.shape[1], dtype=torch.long, device=ids.device)
        with quick_layers(part.numel(), tower.hidden_size):
            cache = tower(part, read, cache=cache, use_cache=True, logits=False)[1]
        yield Pause(part.shape[1])
    return cache


def read_in_chunks(request: Request, size: int) -> Iterator[int]:
    """Read what is pending of one document, at most `size` tokens at once where every tower can go on by several.
    Yields how many were read, after each."""
    document, state = request.documents[0], request.state
    total = pending_tokens(request)
    if total <= size or whole_tokens(request):
        if request.pending:
            request.read_pending()
            yield total
        return
    request.pending = []
    for number, segment in enumerate(document):
        name = segment.modality
        known = state.segments.get(name)
        if known is not None and bool((known == number).any()):
            continue
        for begin in range(0, len(segment.ids or []) + 2, size):
            yield _read_part(request, name, number, begin, begin + size)


def read_rest(request: Request, name: str, begin: int) -> None:
    """Read the end of the newest segment, from one of its tokens on; what came before is in the state."""
    document, cache = request.documents[0], request.model.tower(name).interface.cache
    size, number = len(document[-1].ids or []) + 2, len(document) - 1
    step = size if cache is not None and cache.several else 1
    for start in range(begin, size, step):
        _read_part(request, name, number, start, start + step)


def _read_part(request: Request, name: str, number: int, begin: int, end: int) -> int:
    """Read some tokens of one segment; returns how many."""
    whole = collate(
        [Document([request.documents[0][number]])],
        request.model.specials,
        involved=request.involved,
        towers=[name],
    )[name]
    part = {k: v if k == "involved" else v[:, begin:end] for k, v in whole.items()}
    part["segments"] = torch.full_like(part["segments"], number)
    request.read(Batch({name: part}))
    return part["input_ids"].shape[1]
