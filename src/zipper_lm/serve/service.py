"""A model that is served: its engine, what it can do, and the work that is done for all clients."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from zipper_lm.codecs.codec import PICTURE_KINDS, can_decode
from zipper_lm.data.document import Document, Segment
from zipper_lm.generation.arguments import Schedule, encode_given
from zipper_lm.generation.engine.engine import Engine
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.serve.errors import Refusal, overloaded, refusal_of, unavailable
from zipper_lm.serve.growing import Growing, held_back
from zipper_lm.serve.limits import Limits
from zipper_lm.serve.live import Live
from zipper_lm.serve.metrics import Metrics

T = TypeVar("T")

THREADS = 2
"""For codecs; the engine has one of its own."""
KINDS = ("text", "sound", "picture", "sequence")
LANGUAGE = r"^[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*$"
"""What a language is called, such as ``en`` or ``pt-BR``."""


class Service:
    """One model and all its clients. While it is loaded, and once it ends, nobody is served.

    Args:
        name: what clients call the model. key: that they must have; `None`: none. limits: see there.
        host: where it listens. local: whether only this machine may come in. language: of the model, where it is known.
        turns: how many earlier turns of its connection a spoken answer reads.

    Raises:
        ValueError: for a language that is no code of one.
    """

    def __init__(
        self,
        name: str,
        *,
        key: str | None = None,
        limits: Limits | None = None,
        host: str = "127.0.0.1",
        local: bool = True,
        language: str | None = None,
        turns: int = 0,
    ) -> None:
        if language is not None and not re.match(LANGUAGE, language):
            raise ValueError(f"language must be a code such as en, got {language!r}")
        self.name, self.key, self.limits = name, key, limits or Limits()
        self.host, self.local, self.language, self.turns = host, local, language, turns
        self.created = int(time.time())
        self.metrics = Metrics(lambda: self.documents)
        self.documents = 0
        self.ending = False
        self.connections: Callable[[], int] = lambda: 0  # of the server in front, where it is ours
        self._engine: Engine | None = None
        self._held: dict[str, int] = {}
        # Each works on one core: codecs that share the engine's wait for each other at every operation.
        self._pool = ThreadPoolExecutor(THREADS, "zipper-codec", initializer=torch.set_num_threads, initargs=(1,))

    # --- its life ------------------------------------------------------------------------------------------------

    def begin(self, engine: Engine) -> None:
        """The model is loaded: from now on it is served."""
        self._engine = engine

    @property
    def state(self) -> str:
        """``"ok"``, ``"loading"``, ``"ending"`` or ``"failed"``."""
        if self.ending:
            return "ending"
        if self._engine is None:
            return "loading"
        return "ok" if self._engine.alive else "failed"

    def check_open(self) -> None:
        """Raise `Refusal` unless requests are served."""
        if (state := self.state) != "ok":
            raise unavailable(f"this server is not ready: {state}")

    async def end(self, seconds: float) -> None:
        """Let no new request in, and wait for those that there are, but no longer than so many seconds."""
        self.ending = True
        until = time.monotonic() + seconds
        while self.documents and time.monotonic() < until:
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """End what still runs."""
        self.ending = True
        if self._engine is not None:
            self._engine.close(cancel=True)
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def engine(self) -> Engine:
        """Raises `Refusal` while there is none."""
        if self._engine is None:
            raise unavailable("this server is not ready: loading")
        return self._engine

    @property
    def model(self) -> ZipperModel:
        """What is served."""
        model = self.engine.model
        assert isinstance(model, ZipperModel)
        return model

    # --- what the model can do -----------------------------------------------------------------------------------

    def codec(self, modality: str) -> Any:
        """A modality's codec, `None` where it has none."""
        processor = self.model.processor
        return None if processor is None else processor.codecs.get(modality)

    def kind(self, modality: str) -> str | None:
        """Of `KINDS`; `None` where ids alone are known of it."""
        codec = self.codec(modality)
        if codec is None:
            return None
        if codec.kind == "text" or (codec.kind == "sequence" and not codec.config.edges):  # else it is of numbers
            return str(codec.kind)
        if codec.kind in PICTURE_KINDS:
            return "picture"
        return None if codec.rate is None else "sound"

    def growing(self, modality: str, stops: Sequence[str] = ()) -> Growing:
        """The text of a segment that is to be written, and that ends before `stops`."""
        codec = self.codec(modality)
        if modality not in self._held:
            self._held[modality] = held_back(codec)
        return Growing(codec, self._held[modality], stops)

    def modality(self, kind: str) -> str:
        """The modality of a kind: where there are several, the one of the usual name, else the first.

        Raises:
            Refusal: 404, with what the model has, if there is none.
        """
        usual = {"text": "text", "sound": "speech", "picture": "image"}.get(kind)
        found = [name for name in self.model.names if self.kind(name) == kind]
        if not found:
            has = ", ".join(f"{name} ({self.kind(name) or 'ids alone'})" for name in self.model.names)
            raise Refusal(404, f"{self.name} has no modality for {kind}; it has {has}", code="modality_not_found")
        return usual if usual in found else found[0]

    def check_reads(self, reader: str, source: str) -> None:
        """Raise `Refusal` if one tower cannot read another."""
        if (reader, source) not in self.model.layer_pairs:
            pairs = ", ".join(f"{a} from {b}" for a, b in self.model.layer_pairs) or "nothing"
            raise Refusal(
                404, f"{self.name} does not write {reader} from {source}; it writes {pairs}", code="direction_not_found"
            )

    def speaker(self) -> str:
        """The modality that sound is written in. Raises `Refusal` if there is none that can be heard."""
        name = self.modality("sound")
        if not can_decode(self.codec(name)):
            raise Refusal(404, f"{self.name} writes {name} as ids that nothing turns to sound", code="no_sound")
        return name

    def check_model(self, given: str) -> None:
        """Raise `Refusal` for the name of another model."""
        if given != self.name:
            raise Refusal(
                404, f"no model {given[:80]!r} here; there is {self.name!r}", param="model", code="model_not_found"
            )

    def settings(self, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Generation settings: those kept beside the model, and what a request changes in them."""
        kept = self.model.generation_settings
        names = [name for name in self.model.names if name in kept or name in changes]
        settings = {name: {**kept.get(name, {}), **changes.get(name, {})} for name in names}
        for name, own in settings.items():
            most = own.get("max_new_tokens")
            if isinstance(most, int) and most > self.limits.tokens:
                if name in changes and "max_new_tokens" in changes[name]:
                    self.check_most(most, f"settings.{name}.max_new_tokens")
                own["max_new_tokens"] = self.limits.tokens
        return settings

    def check_most(self, most: int | None, param: str) -> None:
        """Raise `Refusal` for more tokens than one segment may be let grow to."""
        if most is not None and most > self.limits.tokens:
            message = f"{param}={most}, more than the limit of {self.limits.tokens}"
            raise Refusal(400, message, param=param, code="invalid_value")

    # --- work ----------------------------------------------------------------------------------------------------

    async def apart(self, work: Callable[..., T], *args: Any) -> T:
        """Let a thread do what takes long, such as what codecs do."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(*args))

    async def write(
        self,
        document: Document,
        schedule: Schedule,
        changes: Mapping[str, Mapping[str, Any]],
        *,
        params: Sequence[str],
        param: str | None = None,
        **how: Any,
    ) -> Live:
        """Have a document written.

        Args:
            document, schedule: as of `Engine.submit`. changes: of settings, by modality. params: the field that each
                segment came in, those that are given within the schedule last. param: the field that an error of all of
                it is about; by default the last of these. how: other arguments of `Engine.submit`.

        Raises:
            Refusal: if it cannot be written, or as many are written as may be.
        """
        settings = self.settings(changes)
        entries = [schedule] if isinstance(schedule, str | Segment) else list(schedule)
        given = [*document, *(entry for entry in entries if isinstance(entry, Segment))]

        def submit(tell: Any) -> Any:
            read = self._read(given, params)
            known = Document(read[: len(document)])
            rest = iter(read[len(document) :])
            now: Any = schedule
            if not isinstance(schedule, str):
                now = [next(rest) if isinstance(entry, Segment) else entry for entry in entries]
            return self.engine.submit(known, now, settings, on_token=tell, **how)

        return await self._live(submit, param or (params[-1] if params else None))

    def _read(self, segments: Sequence[Segment], params: Sequence[str]) -> list[Segment]:
        """Copies with ids, one after the other: whose fault an error is must be said. In a thread."""
        read: list[Segment] = []
        count = 0
        for segment, param in zip(segments, params, strict=True):
            try:
                read += encode_given(self.model, [Document([segment])])[0].segments
            except ValueError as error:
                message = str(error).removeprefix("document 0: ").removeprefix(f"{segment.modality}: ")
                message = message.removeprefix("text 0: ")  # of one text that stands alone
                raise Refusal(400, f"{param}: {message}", param=param, code="invalid_value") from error
            count += len(read[-1].ids or [])
            self._check_read(count, param)
        return read

    def _check_read(self, count: int, param: str) -> None:
        if count > self.limits.ids:
            message = f"the request comes to more than {self.limits.ids} tokens"
            raise Refusal(400, message, param=param, code="string_too_long")

    async def write_alone(self, modality: str, ids: Sequence[int], changes: Mapping[str, Any], param: str) -> Live:
        """Have one tower go on from ids by itself; see `Engine.submit_alone`. `changes`, `param`: as of `write`."""
        self._check_read(len(ids), param)
        settings = {
            **self.settings({modality: changes})[modality],
            "guidance_scale": None,
            "num_return_sequences": None,
            "best_by": None,
        }
        return await self._live(lambda tell: self.engine.submit_alone(modality, ids, settings, on_token=tell), param)

    async def _live(self, submit: Callable[[Any], Any], param: str | None) -> Live:
        self.check_open()
        if self.documents >= self.limits.documents:
            raise overloaded()
        self.documents += 1
        live = Live(self._leave, self.metrics)
        submitting = asyncio.ensure_future(self.apart(submit, live.tell))
        try:
            handle = await asyncio.shield(submitting)
        except asyncio.CancelledError:  # the client is gone; the thread is not
            submitting.add_done_callback(lambda done: _cancel(done, live))
            raise
        except BaseException as error:
            self._leave()
            raise refusal_of(error, param) from error
        live.follow(handle)
        return live

    def _leave(self) -> None:
        self.documents -= 1


def _cancel(submitting: Any, live: Live) -> None:
    """Nobody wants what a thread has begun."""
    if submitting.cancelled() or submitting.exception() is not None:
        live.leave()
        return
    live.follow(submitting.result())
    live.cancel()
