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
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig

from zipper_lm.codecs.codec import can_decode
from zipper_lm.data.document import Document, Segment, check_modalities
from zipper_lm.fusion.groups import towers_for
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.generation.request import Request
from zipper_lm.generation.segment import Stop, StreamedToken
from zipper_lm.generation.settings import generation_config
from zipper_lm.generation.writer import Modalities

Schedule = str | Sequence[str | Segment | tuple[str, Any]]
Settings = Mapping[str, Mapping[str, Any] | GenerationConfig]


def generate(
    model: ZippedTowers,
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
            Default: greedy, 256 new tokens. ``stop_threshold`` is ours (see `logits.py`).
        max_segments: with "auto", the most segments to write.
        decode: whether to decode written ids to raw values with the processor's codecs, where it has them.
        on_token: told of every token of a single document as it comes; returns whether to go on.

    Returns:
        New documents: the given segments and the written ones. A written segment ends at EOS or at `max_new_tokens`.

    Raises:
        ValueError: for an unknown modality in documents, schedule or settings, or nothing to do.
    """
    settings = {n: generation_config(n, given, model.specials.get(n)) for n, given in (settings or {}).items()}
    entries = checked_schedule(model, schedule, settings)
    if not documents:
        return []
    if on_token is not None and len(documents) != 1:
        raise ValueError(f"tokens can be streamed for one document at a time, got {len(documents)}")
    encoded = encode_given(model, documents)
    with torch.no_grad():
        if entries is None:
            written = _auto(model, encoded, settings, max_segments, on_token)
        else:
            written = _follow(model, encoded, entries, settings, on_token)
    if decode and model.processor is not None:
        decode_written(model, documents, written)
    return written


def checked_schedule(model: Modalities, schedule: Schedule, settings: Settings) -> list[str | Segment] | None:
    if unknown := sorted(set(settings) - set(model.names)):
        raise ValueError(f"settings name {unknown}, but the towers are {model.names}")
    if schedule == "auto":
        if getattr(model.config, "handover_weight", None) == 0:
            raise ValueError('schedule="auto": this model never learned who speaks next (handover_weight 0); name it')
        return None
    if isinstance(schedule, str) or not schedule:
        raise ValueError(f'schedule must be "auto" or a non-empty list of modalities, got {schedule!r}')
    entries = [e if isinstance(e, (str, Segment)) else Segment(*e) for e in schedule]
    for entry in entries:
        name = entry.modality if isinstance(entry, Segment) else entry
        if name not in model.names:
            raise ValueError(f"schedule names {name!r}, but the towers are {model.names}")
    given = [e for e in entries if isinstance(e, Segment)]
    coded = iter(encode_given(model, [Document(given)])[0]) if given else iter(())
    return [next(coded) if isinstance(e, Segment) else e for e in entries]


def encode_given(model: Modalities, documents: Sequence[Document]) -> list[Document]:
    """Copies with ids in every segment, each id in its tower's vocabulary."""
    encoded = _with_ids(model, documents)
    for document in encoded:
        for segment in document:
            model.check_ids(segment.modality, min(segment.ids or [0]), max(segment.ids or [0]))
    return encoded


def _with_ids(model: Modalities, documents: Sequence[Document]) -> list[Document]:
    if model.processor is not None:
        return model.processor.encode(documents)
    copies = [Document(replace(s) for s in d) for d in documents]
    check_modalities(copies, model.names)
    for number, document in enumerate(copies):
        for segment in document:
            if segment.ids is None:
                raise ValueError(
                    f"document {number}: {segment.modality} has a raw value, but the model has no processor"
                )
    return copies


def decode_written(model: Modalities, given: Sequence[Document], written: Sequence[Document]) -> None:
    assert model.processor is not None
    for name, codec in model.processor.codecs.items():
        new = [s for d, old in zip(written, given) for s in d.segments[len(old) :] if s.modality == name]
        if new and can_decode(codec):  # else the ids are what there is
            for segment, value in zip(new, model.processor.decode(name, [s.ids or [] for s in new])):
                segment.value = value if segment.value is None else segment.value


def _follow(
    model: ZippedTowers,
    documents: list[Document],
    entries: list[str | Segment],
    settings: Settings,
    on_token: Callable[[StreamedToken], bool] | None,
) -> list[Document]:
    """Write the segments of a fixed schedule."""
    if model.config.groups:
        return _follow_by_group(model, documents, entries, settings, on_token)
    later = {e.modality if isinstance(e, Segment) else e for e in entries}
    request = Request(model, documents, [later.union(d.modalities) for d in documents])
    stopped = Stop()
    for entry in entries:
        if isinstance(entry, Segment):
            request.read_pending()
            request.append(entry.modality, [entry.ids or []] * len(documents), entry.value)
        else:
            request.write(entry, settings.get(entry), on_token, stopped)
        if stopped.now:
            break
    return request.documents


def _follow_by_group(
    model: ZippedTowers,
    documents: list[Document],
    entries: list[str | Segment],
    settings: Settings,
    on_token: Callable[[StreamedToken], bool] | None,
) -> list[Document]:
    """As `_follow`, where zips were trained apart: each segment is written with towers of its own (see `groups.py`).

    What came before is read anew for every segment, as other towers read it otherwise.
    """
    later = {e.modality if isinstance(e, Segment) else e for e in entries}
    whole = [later.union(d.modalities) for d in documents]
    stopped = Stop()
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
        number = len(documents[0])
        tell = None if on_token is None else lambda t, at=number: on_token(replace(t, segment=at))
        for towers in [set(c) for c in dict.fromkeys(frozenset(c) for c in chosen)]:
            rows = [i for i, c in enumerate(chosen) if c == towers]
            parts = [Document(s for s in documents[i] if s.modality in towers) for i in rows]
            request = Request(model, parts, [whole[i] & towers for i in rows])
            request.write(entry, settings.get(entry), tell, stopped)
            for i, part in zip(rows, request.documents):
                documents[i].segments.append(part[-1])
        if stopped.now:
            break
    return documents


def _auto(
    model: ZippedTowers,
    documents: list[Document],
    settings: Settings,
    max_segments: int,
    on_token: Callable[[StreamedToken], bool] | None,
) -> list[Document]:
    """Write until the model says "done". Rows that choose different speakers part ways."""
    finished: dict[int, Document] = {}
    stopped = Stop()
    todo = [(list(range(len(documents))), Request(model, documents, [set(model.names)] * len(documents)), 0)]
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
                part = Request(model, [request.documents[i] for i in chosen], [set(model.names)] * len(chosen))
            part.write(speaker, settings.get(speaker), on_token, stopped)
            todo.append(([rows[i] for i in chosen], part, count + 1))
    return [finished[i] for i in range(len(documents))]


def stream(
    model: ZippedTowers, document: Document, schedule: Schedule, **kwargs: Any
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

    # Autocast and the current device are each thread's own.
    kind = next(model.parameters()).device.type
    half = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    here = torch.cuda.device(torch.cuda.current_device()) if kind == "cuda" else nullcontext()

    def work() -> None:
        try:
            with half, here:
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
