"""Generation: a schedule of modalities, each segment written by its tower's own `generate()` (`segment.py`).

While a tower speaks, the other towers' memories are only read: they were projected when their segments were finished.
What a `Request` knows is one explicit `State` (see `reading.py`); nothing is kept on the model, so any number of
requests can run on it at once.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from zipper_lm.data.document import Document, Segment
from zipper_lm.fusion.groups import towers_for
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.generation.arguments import (
    Given,
    Schedule,
    Settings,
    check_streamed,
    checked_schedule,
    checked_settings,
    documents_in,
    encode_given,
)
from zipper_lm.generation.candidates import Choose, decode_written
from zipper_lm.generation.read_back import check_reads_back
from zipper_lm.generation.request import Request
from zipper_lm.generation.segment import Stop, StreamedToken
from zipper_lm.generation.writer import Writer
from zipper_lm.utils.shards import is_sharded


class Submits(Protocol):
    """What `generate` asks of an engine (`generation/engine/engine.py`)."""

    model: Any

    def submit(self, document: Any, schedule: Schedule, settings: Settings | None = None, **how: Any) -> Any:
        """Have one document written; returns its handle."""


@dataclass(frozen=True)
class _How:
    """How segments are written, whichever they are.

    Attributes:
        settings: by modality. on_token, choose: as of `generate`. stopped: set once nobody wants to hear more.
    """

    settings: Mapping[str, GenerationConfig]
    on_token: Callable[[StreamedToken], bool] | None
    choose: Choose | None
    stopped: Stop = field(default_factory=Stop)

    def write(self, request: Request, name: str) -> None:
        request.write(name, self.settings.get(name), self.on_token, self.stopped, self.choose)


def generate(
    model: ZippedTowers,
    documents: Given | Sequence[Any],
    schedule: Schedule,
    *,
    settings: Settings | None = None,
    max_segments: int = 8,
    decode: bool = True,
    choose: Choose | None = None,
    on_token: Callable[[StreamedToken], bool] | None = None,
    engine: Submits | None = None,
    **flat: Any,
) -> Any:
    """Let towers write the next segments of documents.

    Args:
        model: the model.
        documents: what is given, not changed: a `Document`, a text, ``(modality, value)``, or a list of these, which
            may differ in length and layout. In a list, a list of segments is a document.
        schedule: what comes next, such as ``"text"``, ``["text", "speech"]``, also with given segments in between
            (`Segment` or ``(modality, value)``); or ``"auto"``: the model says who speaks next, until it says "done".
        settings: per modality, a `GenerationConfig` or its arguments (`do_sample`, `num_beams`, `max_new_tokens`, ...),
            or one `GenerationConfig` for all; `None`: those kept beside the model (`model.generation_settings`). What
            nobody says: greedy, 256 new tokens. ``stop_threshold``, ``seed`` and ``best_by`` are ours.
        max_segments: with "auto", the most segments to write.
        decode: whether to decode written ids to raw values with the processor's codecs, where it has them.
        choose: with `num_return_sequences` above 1, which candidate for a segment goes on; it is given the documents
            before it and, for each, the candidates (decoded), and returns a number for each. `None`: the one that the
            model gives the highest probability, or, with ``best_by: "reading"`` in settings, the one that it reads best
            what comes before from (see `read_back.py`).
        on_token: told of every token of a single document as it comes; returns whether to go on.
        engine: of this model (`zipper_lm.Engine`), to write all documents side by side, each token by a captured step.
        flat: settings of every modality, where `settings` does not say otherwise.

    Returns:
        New documents, the given segments and the written ones: a list for a list, one for one. A written segment ends
        at EOS or at `max_new_tokens`. With `num_return_sequences` above 1 it has `candidates`, with `output_scores`
        or several candidates `logprobs`.

    Raises:
        ValueError: for documents, a schedule or settings of another form, an unknown modality in any of them, or
            nothing to do.
    """
    given, alone = documents_in(documents)
    chosen = checked_settings(model, settings, flat)
    entries = checked_schedule(model, schedule)
    if not isinstance(max_segments, int) or max_segments < 0:
        raise ValueError(f"max_segments must be a whole number from 0 on, got {max_segments!r}")
    if not given:
        return []
    check_reads_back(model, chosen)
    if on_token is not None:
        check_streamed(given, chosen)
    if engine is not None:
        written = _by_engine(model, engine, given, schedule, chosen, max_segments, choose, on_token)
        if decode:
            decode_written(model.processor, given, written)
        return written[0] if alone else written
    encoded, how = encode_given(model, given), _How(chosen, on_token, choose)
    with torch.no_grad():
        if entries is None:
            written = _auto(model, encoded, how, max_segments)
        elif model.config.groups:
            written = _follow_by_group(model, encoded, entries, how)
        else:
            written = _follow(model, encoded, entries, how)
    if decode:
        decode_written(model.processor, given, written)
    return written[0] if alone else written


def _by_engine(
    model: ZippedTowers,
    engine: Submits,
    given: Sequence[Document],
    schedule: Schedule,
    settings: Mapping[str, GenerationConfig],
    max_segments: int,
    choose: Choose | None,
    on_token: Callable[[StreamedToken], bool] | None,
) -> list[Document]:
    """Write all documents with an engine. If one fails, or the caller is interrupted, none goes on."""
    if engine.model is not model:
        raise ValueError("engine: it writes with another model")
    handles: list[Any] = []
    how: dict[str, Any] = {"max_segments": max_segments, "choose": choose, "wait": True}
    try:
        for number, document in enumerate(given):
            handles.append(engine.submit(document, schedule, settings, number=number, **how))
        if on_token is not None:
            heard: list[StreamedToken] = []
            for token in handles[0]:
                heard.append(token)
                if not on_token(token):
                    return [_so_far(model, given[0], schedule, heard)]
        return [handle.result(decode=False) for handle in handles]
    finally:
        for handle in handles:
            handle.cancel()


def _so_far(model: ZippedTowers, given: Document, schedule: Schedule, heard: list[StreamedToken]) -> Document:
    """What was written of a document when its last heard token came, and the segments given in between. A segment that
    nothing was written in is there with a fixed schedule; with "auto" nobody heard whose it was."""
    document = encode_given(model, [given])[0]
    entries = list(checked_schedule(model, schedule) or ())
    ids: dict[int, list[int]] = {}
    for token in heard:
        ids.setdefault(token.segment, []).append(token.id)
    names = {token.segment: token.modality for token in heard}
    for number in range(len(document), heard[-1].segment + 1):
        entry = entries.pop(0) if entries else names.get(number)
        if entry is not None:
            document.segments.append(entry if isinstance(entry, Segment) else Segment(entry, ids=ids.get(number, [])))
    return document


def _follow(model: ZippedTowers, documents: list[Document], entries: list[str | Segment], how: _How) -> list[Document]:
    """Write the segments of a fixed schedule."""
    later = {e.modality if isinstance(e, Segment) else e for e in entries}
    request = Request(model, documents, [later.union(d.modalities) for d in documents])
    for entry in entries:
        if isinstance(entry, Segment):
            request.read_pending()
            request.append(entry.modality, [entry.ids or []] * len(documents), entry.value)
        else:
            how.write(request, entry)
        if how.stopped.now:
            break
    return request.documents


def _follow_by_group(
    model: ZippedTowers, documents: list[Document], entries: list[str | Segment], how: _How
) -> list[Document]:
    """As `_follow`, where zips were trained apart: each segment is written with towers of its own (see `groups.py`).

    What came before is read anew for every segment, as other towers read it otherwise.
    """
    later = {e.modality if isinstance(e, Segment) else e for e in entries}
    whole = [later.union(d.modalities) for d in documents]
    for entry in entries:
        if isinstance(entry, Segment):
            for document in documents:
                document.segments.append(replace(entry))
            continue
        for earlier in (set(d.modalities) - {entry} for d in documents):
            if earlier and not any((entry, source) in model.layer_pairs for source in earlier):
                raise ValueError(
                    f"{entry!r} reads none of {sorted(earlier)}: there is no zip; let another write between"
                )
        chosen = [towers_for(model, entry, d.modalities, all_) for d, all_ in zip(documents, whole)]
        number, on_token = len(documents[0]), how.on_token
        tell = None if on_token is None else lambda t, at=number, on=on_token: on(replace(t, segment=at))
        for towers in [set(c) for c in dict.fromkeys(frozenset(c) for c in chosen)]:
            rows = [i for i, c in enumerate(chosen) if c == towers]
            parts = [Document(s for s in documents[i] if s.modality in towers) for i in rows]
            request = Request(model, parts, [whole[i] & towers for i in rows], rows)
            replace(how, on_token=tell).write(request, entry)
            for i, part in zip(rows, request.documents):
                documents[i].segments.append(part[-1])
        if how.stopped.now:
            break
    return documents


def _auto(model: ZippedTowers, documents: list[Document], how: _How, max_segments: int) -> list[Document]:
    """Write until the model says "done". Rows that choose different speakers part ways."""
    finished: dict[int, Document] = {}
    todo = [(list(range(len(documents))), Request(model, documents, [set(model.names)] * len(documents)), 0)]
    while todo:
        rows, request, count = todo.pop()
        going = count < max_segments and not how.stopped.now
        choices = request.next_speakers() if going else [None] * len(rows)
        for speaker in dict.fromkeys(choices):
            chosen = [i for i, c in enumerate(choices) if c == speaker]
            if speaker is None:
                finished |= {rows[i]: request.documents[i] for i in chosen}
                continue
            part = request
            if len(chosen) < len(rows):
                taking_part = [set(model.names)] * len(chosen)
                part = Request(model, [request.documents[i] for i in chosen], taking_part, [rows[i] for i in chosen])
            how.write(part, speaker)
            todo.append(([rows[i] for i in chosen], part, count + 1))
    return [finished[i] for i in range(len(documents))]


def stream(
    model: Writer, document: Given, schedule: Schedule, **kwargs: Any
) -> Generator[StreamedToken, None, Document]:
    """Write as `generate` does, for one document, and yield each token as it comes. Raises `ValueError` for a model
    that is spread over processes.

    The work is done in a thread of its own. The finished document is the value of the iterator's `StopIteration`
    (``document = yield from stream(...)``). Closing the iterator early stops the writing.
    """
    if is_sharded(model):  # type: ignore[arg-type]
        raise ValueError("stream: a model that is spread over processes is written with by generate, in all of them")
    documents, _ = documents_in(document)
    tokens: queue.Queue[StreamedToken | None] = queue.Queue()
    closed = threading.Event()
    result: list[Document] = []
    failure: list[BaseException] = []

    def on_token(token: StreamedToken) -> bool:
        tokens.put(token)
        return not closed.is_set()

    # Autocast and the current device are each thread's own.
    kind = next(model.parameters()).device.type
    half = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    here = torch.cuda.device(torch.cuda.current_device()) if kind == "cuda" else nullcontext()

    def work() -> None:
        try:
            with half, here:
                result.extend(model.generate(documents, schedule, on_token=on_token, **kwargs))
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
