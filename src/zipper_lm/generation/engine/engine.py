"""An engine: documents of many requests are written side by side, each token by a captured step.

One thread owns it. Between two steps it takes in who is new, lets readers read one chunk, gives free rows to those who
wait for them, in turn, and forgets who does not want to hear more. Nothing is kept on the model.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from transformers import GenerationConfig

from zipper_lm.data.document import Document, Segment
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.generation.arguments import (
    Given,
    Schedule,
    Settings,
    checked_schedule,
    checked_settings,
    documents_in,
    encode_given,
)
from zipper_lm.generation.candidates import Choose, samples_of
from zipper_lm.generation.engine.alone import Prompt
from zipper_lm.generation.engine.capture import Capture, learn_capture
from zipper_lm.generation.engine.handle import EngineClosed, EngineFull, Handle
from zipper_lm.generation.engine.lane import Lane, Sitting
from zipper_lm.generation.engine.room import Room
from zipper_lm.generation.engine.together import can_share, companions, pending_tokens, read_together
from zipper_lm.generation.engine.watch import Watch
from zipper_lm.generation.engine.weights import Form
from zipper_lm.generation.engine.writing import Apart, Order, Pause, Read, Sample, Writing
from zipper_lm.generation.read_back import check_reads_back
from zipper_lm.generation.request import Request
from zipper_lm.generation.sampling import SEEDS
from zipper_lm.generation.segment import StreamedToken
from zipper_lm.generation.settings import SEED
from zipper_lm.utils.shards import is_sharded

logger = logging.getLogger(__name__)

APART = 2  # threads for what an engine does not do itself
IDLE = 4
"""Chunks that are read at once while no row writes, which would have to wait."""


class _Task:
    """A document's coroutine, what it is to be sent next, and what it waits to have read, along with others' or not."""

    def __init__(self, handle: Handle, writing: Writing, version: int) -> None:
        self.handle, self.writing, self.version = handle, writing, version
        self.answer: Any = None
        self.unread: Request | None = None


class Engine:
    """Writes documents of one model side by side.

    Args:
        model: a `ZipperModel` in evaluation mode. It may be used otherwise meanwhile, but not trained: documents that
            are being written when its weights change fail.
        slots: rows of each tower's step: documents, or samples of one, that are written side by side; with guidance
            each takes two. The number is fixed, so that a document's tokens do not depend on who else writes.
        compile: compile each step (a minute for a large tower, at its first token and when it must become larger);
            where there is no compiler, and without, the same step runs as it is.
        weights: `None`, ``"bf16"`` or ``"int8"``: how the steps hold the matrices of frozen towers.
        tokens, memory: how many tokens a tower's stream may have, and how many of another tower's it may read;
            `None`: what is needed.
        chunk: tokens that are read at once between two steps.
        limit: documents that may wait or be written at once; `None`: any number.

    Raises:
        ValueError: for sizes below 1, a model in training mode or spread over processes, or another form of weights.
    """

    def __init__(
        self,
        model: ZippedTowers,
        *,
        slots: int = 8,
        compile: bool = True,
        weights: Form | None = None,
        tokens: int | None = None,
        memory: int | None = None,
        chunk: int = 256,
        limit: int | None = None,
    ) -> None:
        sizes = {"slots": slots, "chunk": chunk, "tokens": tokens, "memory": memory, "limit": limit}
        for field, value in sizes.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"Engine: {field} must be a whole number from 1 on, got {value!r}")
        if weights not in (None, "bf16", "int8"):
            raise ValueError(f"Engine: weights must be None, 'bf16' or 'int8', got {weights!r}")
        if not isinstance(model, ZippedTowers):
            raise ValueError(f"Engine: needs a ZipperModel, got a {type(model).__name__}")
        if model.is_apart:
            raise ValueError(f"Engine: towers on several devices ({model.hf_device_map}): use generate, or one device")
        if is_sharded(model):
            raise ValueError(
                "Engine: a model that is spread over processes (FSDP) has no step of its own; load it whole"
            )
        self.model, self.slots, self.chunk, self.limit = model, slots, chunk, limit
        self.tokens, self.memory = tokens, memory
        self._room = Room(model, slots, tokens, memory)
        self._check_mode()
        frozen = {name for name, spec in model.config.tower_specs.items() if spec.train == "frozen"}
        self._lanes = {n: Lane(model, n, slots, compile, weights if n in frozen else None) for n in model.names}
        self._captures: dict[str, Capture] = {}
        self._shared: dict[str, bool] = {}
        self._said: set[tuple[str, str]] = set()
        self._new: deque[_Task] = deque()
        self._ready: deque[_Task] = deque()
        self._tasks: dict[Handle, _Task] = {}
        self._awake = threading.Condition()
        self._back: deque[tuple[_Task, Future[Any]]] = deque()
        self._closed = False
        self._dead: BaseException | None = None
        self._watch = Watch(model)
        self._version = self._weights_version()
        self._apart_here = threading.local()
        self._pool = ThreadPoolExecutor(APART, thread_name_prefix="zipper-apart")
        kind = next(model.parameters()).device.type
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self._device = torch.cuda.current_device() if kind == "cuda" else None
        self._thread = threading.Thread(target=self._work, name="zipper-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.close(cancel=error is not None)

    @property
    def alive(self) -> bool:
        """Whether it takes documents."""
        return not self._closed and self._dead is None and self._thread.is_alive()

    @property
    def pending(self) -> int:
        """Documents that wait or are being written."""
        return len(self._tasks)

    def submit(
        self,
        document: Given,
        schedule: Schedule,
        settings: Settings | None = None,
        *,
        max_segments: int = 8,
        choose: Choose | None = None,
        number: int = 0,
        on_token: Callable[[StreamedToken], None] | None = None,
        wait: bool = False,
        **flat: Any,
    ) -> Handle:
        """Have the next segments of one document written; returns at once. May be called by any thread.

        Args:
            document, schedule, settings, max_segments, choose, flat: as of `generate`. With ``seed``, what is drawn
                depends on it, on `number`, the segment and the place alone.
            number: of the document among those of its call.
            on_token: told of each token as it comes, in the engine's thread, which it must not hold up; the handle then
                yields none, and if it raises, its error.
            wait: whether to wait while `limit` documents wait or are written.

        Raises:
            ValueError: for what `generate` refuses, and for more tokens or rows than the engine was made for.
            EngineFull: if `limit` documents wait or are written. EngineClosed: once it is closed.
        """
        given, alone = documents_in(document)
        if not alone:
            raise ValueError(f"Engine.submit takes one document, got a list of {len(given)}")
        chosen = checked_settings(self.model, settings, flat)
        entries = checked_schedule(self.model, schedule)
        if not isinstance(max_segments, int) or max_segments < 0:
            raise ValueError(f"max_segments must be a whole number from 0 on, got {max_segments!r}")
        check_reads_back(self.model, chosen)
        encoded = encode_given(self.model, given)[0]
        self._check_mode()
        self._room.check(encoded, entries, chosen)
        handle = Handle(given[0], self.model.processor, on_token)
        order = Order(
            document=encoded,
            entries=entries,
            settings=chosen,
            max_segments=max_segments,
            choose=choose,
            **self._terms(handle, number, chosen.values()),
        )
        return self._enter(handle, order.write(), wait)

    def submit_alone(
        self,
        name: str,
        ids: Sequence[int],
        settings: Mapping[str, Any] | GenerationConfig | None = None,
        *,
        number: int = 0,
        on_token: Callable[[StreamedToken], None] | None = None,
    ) -> Handle:
        """Have one tower go on from ids by itself, as the backbone it was before it was zipped; returns at once.

        Args:
            name: the tower. ids: what it reads, at least one, as they are: no BOS is put before or behind them.
            settings: of what is written; one sample, no guidance. number, on_token: as of `submit`.

        Returns:
            the handle of a document of two segments: the ids that were given, and those that were written.

        Raises:
            ValueError, EngineFull, EngineClosed: as `submit`.
        """
        (chosen,) = checked_settings(self.model, {name: settings or {}}).values()
        if samples_of(chosen) > 1 or chosen.guidance_scale not in (None, 1):
            raise ValueError(f"settings for {name!r}: a tower by itself writes one sample, without guidance_scale")
        if not ids:
            raise ValueError(f"tower {name!r}: there are no ids to go on from")
        self.model.check_ids(name, min(ids), max(ids))
        self._check_mode()
        self._room.check_sizes(name, len(ids), chosen, {})
        handle = Handle(Document([Segment(name, ids=list(ids))]), self.model.processor, on_token)
        prompt = Prompt(
            name=name,
            ids=ids,
            settings=chosen,
            **self._terms(handle, number, [chosen]),
        )
        return self._enter(handle, prompt.write())

    def _terms(self, handle: Handle, number: int, settings: Iterable[GenerationConfig]) -> dict[str, Any]:
        """See `Terms`. Only who draws without a seed takes one of torch's."""
        unseeded = any(given.do_sample and getattr(given, SEED, None) is None for given in settings)
        return {
            "model": self.model,
            "number": number,
            "seed": int(torch.randint(SEEDS, ()).item()) if unseeded else 0,
            "chunk": self.chunk,
            "fault": self._fault,
            "leave": self._leave,
            "on_token": handle.tell,
            "stop": handle.stop,
        }

    def _enter(self, handle: Handle, writing: Writing, wait: bool = False) -> Handle:
        """A document is new: it waits for its turn."""
        with self._awake:
            while self.alive and self.limit is not None and len(self._tasks) >= self.limit:
                if not wait or self._is_own_thread():
                    raise EngineFull(
                        f"{len(self._tasks)} documents wait or are being written, the limit is {self.limit}"
                    )
                self._awake.wait()
            if not self.alive:
                raise EngineClosed(self._end_of_it())
            task = _Task(handle, writing, self._weights_version())
            self._tasks[handle] = task
            self._new.append(task)
            self._awake.notify_all()
        return handle

    def _is_own_thread(self) -> bool:
        """Whether who calls is what an engine waits for itself: it must not wait for the engine."""
        return threading.current_thread() is self._thread or getattr(self._apart_here, "now", False)

    def generate(self, documents: Any, schedule: Schedule, **how: Any) -> Any:
        """As `ZipperModel.generate`, by this engine."""
        return self.model.generate(documents, schedule, engine=self, **how)  # type: ignore[operator]

    def close(self, *, cancel: bool = False, timeout: float | None = None) -> None:
        """Take nothing more, finish what there is, and end. Called by `choose` or `on_token`, it waits for nothing: the
        engine ends once they have returned.

        Args:
            cancel: whether what is not finished is cancelled. timeout: in seconds, after which it is.
        """
        with self._awake:
            self._closed = True
            if cancel:
                for handle in list(self._tasks):
                    handle.cancel()
            self._awake.notify_all()
        if self._is_own_thread():
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.close(cancel=True)

    def _end_of_it(self) -> str:
        if self._dead is not None:
            return f"the engine failed: {self._dead!r}"
        if self._closed:
            return "the engine is closed"
        return "the engine's thread is in another process: a process that was forked needs an engine of its own"

    # --- what is checked -----------------------------------------------------------------------------------------

    def _check_mode(self) -> None:
        if self.model.training:
            raise ValueError("Engine: the model is in training mode, where it drops out; call model.eval()")

    def _weights_version(self) -> int:
        """See `Watch`."""
        while (version := self._watch.version()) is None:
            self._watch = Watch(self.model)
        return version

    def _capture(self, name: str) -> Capture:
        if name not in self._captures:
            self._captures[name] = learn_capture(self.model, name)
            self._lanes[name].attention = self._captures[name].attention
        return self._captures[name]

    def _can_share(self, name: str) -> bool:
        """Whether several documents of a tower may be read in one pass."""
        if name not in self._shared:
            self._shared[name] = can_share(self.model, name) and self._capture(name).fault is None
        return self._shared[name]

    def _fault(self, name: str, setting: str | None) -> str | None:
        """Why a segment of a tower is written on the plain path; said once."""
        unable = self._capture(name).fault
        fault = unable or (None if setting is None else f"{setting} is followed there only")
        kind = name, unable or (setting or "").partition("=")[0]  # not once for every value
        if fault is not None and kind not in self._said:
            self._said.add(kind)
            logger.warning("tower %r writes without a captured step: %s", name, fault)
        return fault

    # --- the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with self._surroundings():
                while self._wait():
                    self._turn()
        except BaseException as error:
            with self._awake:  # whoever enters sees it, or is ended below
                self._dead = error
            logger.exception("the engine failed")
        finally:
            for task in list(self._tasks.values()):
                self._end(task, None, self._dead or EngineClosed("the engine was closed"))
            self._pool.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Gradients, autocast and the current device are each thread's own."""
        kind, dtype, enabled = self._autocast
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(kind, dtype, enabled))
            if self._device is not None:
                stack.enter_context(torch.cuda.device(self._device))
            yield

    def _wait(self) -> bool:
        """Wait for something to do; whether there is."""
        with self._awake:
            while True:
                if self._new or self._ready or self._back or any(lane.busy for lane in self._lanes.values()):
                    return True
                if any(task.handle.stop.now for task in self._tasks.values()):
                    return True
                if self._closed and not self._tasks:
                    return False
                self._awake.wait(0.05 if self._tasks else None)  # a cancelled one does not call

    def _turn(self) -> None:
        """What is done between two steps, and one step of every tower that writes."""
        with self._awake:
            self._ready.extend(self._new)
            self._new.clear()
            while self._back:
                task, future = self._back.popleft()
                self._come_back(task, future)
            unwanted = [t for t in self._tasks.values() if t.handle.stop.now]
        for task in unwanted:
            self._end(task, None, task.handle.failure or CancelledError())
        if self._ready and (version := self._weights_version()) != self._version:
            self._renew(version)
        budget = self.chunk * (1 if any(lane.busy for lane in self._lanes.values()) else IDLE)
        while self._ready and budget > 0:
            task = self._ready.popleft()
            budget -= (self._read(task, budget) if task.unread is not None else 0) or self._advance(task)
        for lane in self._lanes.values():
            self._run(lane)

    def _run(self, lane: Lane) -> None:
        try:
            lane.seat()
            done = lane.run() if lane.busy else []
        except Exception as error:  # such as no memory left: who sits here has lost its place
            logger.exception("tower %r: a step failed", lane.name)
            for each in [*lane.sitting, *([lane.waiting[0]] if lane.waiting and not lane.sitting else [])]:
                self._end(each.owner, None, error)
            lane.renew()
            return
        for each in done:  # before whoever reads, as their rows are free then
            each.owner.answer = each.samples if each.error is None else each.error
            self._ready.appendleft(each.owner)

    def _read(self, task: _Task, most: int) -> int:
        """Read a document along with others of its kind that wait; returns how many tokens that were. 0: it is alone,
        or fails with them, and is left to itself."""
        first, task.unread = task.unread, None
        if task.handle not in self._tasks or first is None or not all(map(self._can_share, first.pending)):
            return 0
        waiting = [each for each in self._ready if each.unread is not None and each.handle in self._tasks]
        chosen = companions(first, [each.unread for each in waiting if each.unread is not None], most)
        if not chosen:
            return 0
        tokens, taken = sum(map(pending_tokens, [first, *chosen])), {id(request) for request in chosen}
        for each in waiting:
            if id(each.unread) in taken:
                each.unread = None
        try:
            read_together([first, *chosen])
        except Exception as error:  # of any kind: each will fail by itself, or not
            logger.debug("%d documents are read one by one: %s", 1 + len(chosen), error)
            return 0
        self._ready.appendleft(task)
        return tokens

    def _advance(self, task: _Task) -> int:
        """Let a document go on to its next wait; returns how many tokens were read."""
        if task.handle not in self._tasks:
            return 0
        if task.version != self._version:
            self._end(task, None, RuntimeError("the model's weights changed while the document was written"))
            return 0
        if self.model.training:  # what is read now would be read with dropout
            self._end(task, None, RuntimeError("the model went into training mode while the document was written"))
            return 0
        answer, task.answer = task.answer, None
        try:
            command = task.writing.throw(answer) if isinstance(answer, BaseException) else task.writing.send(answer)
        except StopIteration as stop:
            self._end(task, stop.value, task.handle.failure)
            return 1
        except Exception as error:
            self._end(task, None, error)
            return 1
        if isinstance(command, Pause):
            self._ready.append(task)
            return command.tokens
        if isinstance(command, Read):
            task.unread = command.request
            self._ready.append(task)
            return 0
        if isinstance(command, Apart):
            future = self._pool.submit(self._apart, command)
            future.add_done_callback(lambda f: self._call_back(task, f))
            return 1
        try:
            self._room.check_sizes(
                command.name,
                len(command.stream),
                GenerationConfig(max_new_tokens=command.wanted.most),
                {s: ids.shape[1] for s, ids in command.state.segments.items() if s != command.name},
            )
        except ValueError as error:
            task.answer = error
            self._ready.append(task)
            return 1
        self._lanes[command.name].waiting.append(Sitting(task, command))
        return 1

    def _apart(self, command: Apart) -> Any:
        self._apart_here.now = True
        with self._surroundings():
            return command.work()

    def _call_back(self, task: _Task, future: Future[Any]) -> None:
        with self._awake:
            self._back.append((task, future))
            self._awake.notify_all()

    def _come_back(self, task: _Task, future: Future[Any]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        task.answer = future.result() if error is None else error
        self._ready.append(task)

    def _renew(self, version: int) -> None:
        """The weights are others: whoever was being written fails, and steps are made anew."""
        with self._awake:
            old = [t for t in self._tasks.values() if t.version != version]
        for task in old:
            self._end(task, None, RuntimeError("the model's weights changed while the document was written"))
        for lane in self._lanes.values():
            lane.renew()
        self._captures.clear()
        self._shared.clear()
        self._version = version

    def _leave(self, samples: list[Sample]) -> None:
        for lane in self._lanes.values():
            lane.leave(samples)

    def _end(self, task: _Task, document: Document | None, error: BaseException | None) -> None:
        """Forget a document, and say how it ended."""
        with self._awake:
            self._tasks.pop(task.handle, None)
            self._awake.notify_all()
        for lane in self._lanes.values():
            lane.drop(task)
        if not isinstance(error, EngineClosed) and document is None:
            task.writing.close()
        task.handle.finish(document, error)
