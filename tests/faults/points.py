"""Moments of a process at which a fault can be put, numbered in the order in which they come.

A moment is a call that changes something in the folder of the run (opening to write, renaming, linking, making and
removing: Python's audit events), the middle of a file that is being written, or the beginning and the end of a piece of
work: a step, its backward pass, the optimizer's step, a checkpoint, an evaluation, a batch of labels. One run without a
fault notes them all; a test draws some of them, spread over the phases, and has another run meet its fault there.

What is patched here is patched in the process of the run alone.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

_WRITES = os.O_WRONLY | os.O_RDWR
_GROWS = ("open", "os.mkdir")
"""What needs space."""
_CHANGES = ("os.rename", "os.link", "os.rmdir", "os.remove", "os.truncate", "shutil.rmtree", "shutil.copyfile")
_ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS}
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}


class Points:
    """Counts moments, notes them, and lets one of them have its fault.

    Args:
        folder: of the run; what happens elsewhere is nothing.
        fault: ``{"at": number, "do": what}``, or none. What: a signal of `SIGNALS`, which the process sends itself, or
            ``"full"`` or ``"read-only"``: from there on nothing can be written; ``"kill children"``; ``"interrupt
            twice"``; ``"set back"`` (the clock); ``"remove"`` (the ``"file"``).
        notes: file for the moments, a line of JSON each: number, phase, what. steps: file for a line per training step.
    """

    def __init__(
        self, folder: Path, fault: dict[str, Any] | None = None, notes: str | None = None, steps: str | None = None
    ) -> None:
        self.folder, self.fault = f"{folder.resolve()}{os.sep}", fault
        self.notes, self.steps = (self._opened(name) for name in (notes, steps))
        self.number, self.phases, self.broken = 0, ["start"], ""
        self.own = threading.get_ident()

    @staticmethod
    def _opened(name: str | None) -> int | None:
        return None if name is None else os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def install(self) -> None:
        """From now on."""
        for owner, name, phase in _work():
            self._around(owner, name, phase)
        for owner, name, place, error in _writers():
            self._torn(owner, name, place, error)
        self._step_notes()
        sys.addaudithook(self._heard)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Moments inside are of this phase, unless it is an inner one's."""
        self.phases.append(name)
        try:
            yield
        finally:
            self.phases.pop()

    def moment(self, what: str, file: Path | None = None, error: Callable[[], Exception] | None = None) -> None:
        """One of them.

        Args:
            what: happens. file: that is half written now, where it is one. error: of a writer that finds no space.
        """
        if threading.get_ident() != self.own:
            return
        self.number += 1
        if self.notes is not None:
            os.write(self.notes, (json.dumps([self.number, self.phases[-1], what]) + "\n").encode())
        if self.fault is None or self.number < self.fault["at"]:
            return
        do = self.fault["do"]
        if do in _ERRORS:
            self.broken = do
            if file is not None:
                os.truncate(file, file.stat().st_size // 2)
                raise error() if error is not None else self._error()
        elif self.number == self.fault["at"]:
            if file is not None and do == "kill":
                os.truncate(file, file.stat().st_size // 2)
            self._do(do)

    def _do(self, what: str) -> None:
        if what == "kill children":
            for child in psutil.Process().children():
                child.kill()
        elif what == "remove":
            assert self.fault is not None
            os.unlink(self.fault["file"])
        elif what == "set back":  # the clock, and with it the times of what was written
            now = time.time
            time.time = lambda: now() - 1e7
            for path in Path(self.folder).rglob("*"):
                os.utime(path, (now() - 1e7 - 100 * self.number, now() - 1e7 - 100 * self.number))
        elif what == "interrupt twice":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.5)
            os.kill(os.getpid(), signal.SIGINT)
        else:
            os.kill(os.getpid(), SIGNALS[what])

    def _error(self) -> OSError:
        number = _ERRORS[self.broken]
        return OSError(number, os.strerror(number))

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _GROWS and event not in _CHANGES:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITES):
            return
        path = args[1] if event in ("os.rename", "os.link", "shutil.copyfile") else args[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        place = os.path.abspath(os.fsdecode(path))
        if not place.startswith(self.folder):
            return
        here = place.removeprefix(self.folder)
        with self.phase(_phase_of(here) or self.phases[-1]):
            self.moment(f"{event} {here}")
        if self.broken == "read-only" or (self.broken and event in _GROWS):
            raise self._error()

    def _around(self, owner: Any, name: str, phase: str) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase or self.phases[-1]):
                self.moment(f"{name} begins")
                found = real(*args, **kwargs)
                self.moment(f"{name} ends")
            return found

        setattr(owner, name, call)

    def _torn(self, owner: Any, name: str, place: int, error: Callable[[], Exception] | None) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def write(*args: Any, **kwargs: Any) -> Any:
            file = args[place] if len(args) > place else None
            here = isinstance(file, str | os.PathLike) and os.path.abspath(os.fspath(file)).startswith(self.folder)
            if here and self.broken and error is not None:
                raise error()
            written = real(*args, **kwargs)
            if here and isinstance(file, str | os.PathLike):
                self.moment(f"{name} in the middle of {os.path.basename(os.fspath(file))}", Path(file), error)
            return written

        for module in [owner, *sys.modules.values()]:  # many have it under a name of their own
            if getattr(module, "__dict__", {}).get(name) is real:
                setattr(module, name, write)

    def _step_notes(self) -> None:
        from transformers import Trainer

        real = Trainer.training_step

        def training_step(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
            if self.steps is not None:
                told = [os.path.basename(str(trainer.args.output_dir)), trainer.state.global_step + 1]
                os.write(self.steps, (json.dumps(told) + "\n").encode())
            return real(trainer, *args, **kwargs)

        Trainer.training_step = training_step  # type: ignore[method-assign]


def _phase_of(place: str) -> str:
    """Of what `zipper prepare` writes, by where it is; ``""`` says nothing."""
    first, *rest = Path(place).parts
    if first.endswith(".preparing"):
        return "shard" if rest else "begin"
    return ""


def _work() -> list[tuple[Any, str, str]]:
    """Pieces of work: where, their name, and the phase that they are (``""``: a part of one)."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer

    from zipper_lm.experiments import run as experiments
    from zipper_lm.jobs import fuse, materials, towers
    from zipper_lm.models.zipper import ZipperModel
    from zipper_lm.training.trainer import ZipperTrainer

    return [
        (Trainer, "training_step", "step"),
        (Accelerator, "backward", "step"),
        (AcceleratedOptimizer, "step", "step"),
        (Trainer, "_save_checkpoint", "save"),
        (ZipperTrainer, "evaluate", "evaluation"),
        (ZipperTrainer, "keep_prefixes", "prefixes"),
        (ZipperModel, "generate", ""),
        (materials, "label", "labels"),
        (materials, "write_labels", "labels"),
        (materials, "begin", "begin"),
        (towers, "pretrain", "pretrain"),
        (fuse, "write_run", "output"),
        (experiments, "_scores", "scores"),
        (experiments, "keep", "record"),
    ]


def _writers() -> list[tuple[Any, str, int, Callable[[], Exception] | None]]:
    """What writes a file at once: where, its name, which argument is the file, and what it raises on a full disk."""
    import safetensors.torch
    import torch

    full = os.strerror(errno.ENOSPC)
    return [
        (torch, "save", 1, lambda: RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")),
        (safetensors.torch, "save_file", 1, lambda: SafetensorError(f"Error while serializing: I/O error: {full}")),
        (Path, "write_text", 0, None),
    ]
