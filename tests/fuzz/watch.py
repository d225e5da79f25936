"""One input at a time, watched: what came of it, what it cost, and whether it reached for anything that is not its own.

A refusal counts only if our own code raises it: a `ValueError` that a library let through says nothing to a user.
"""

from __future__ import annotations

import hashlib
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zipper_lm

CPU_SECONDS, MEBIBYTES = 2.0, 500.0
"""What one input may take, on a machine that does other work, too: so seconds of the processor, not of the clock, and
the least of three times, as others that use its caches cost the processor time, too."""
TIMES = 3
PATIENCE = 10.0
"""Seconds of the processor after which an input is interrupted."""
OUTSIDE = "@outside@"
"""In an input: the folder around the one in which it is read. Nothing there may be opened."""
SECRETS = ("secret.txt", "secret.wav", "secret.png", "secret.tar")
_OURS = str(Path(zipper_lm.__file__).parent)
_HERE = str(Path(__file__).parent)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_NEVER = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty")
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")


class Reached(BaseException):
    """Something was done that no file may ask for. No `Exception`, so that nobody takes it for one of theirs."""


class TooSlow(BaseException):
    """An input is interrupted."""


@dataclass
class Bug:
    """What should not have come of an input."""

    kind: str
    told: str
    data: bytes

    @property
    def key(self) -> str:
        """The same for inputs that show the same bug."""
        return hashlib.sha256(self.kind.encode()).hexdigest()[:12]


@dataclass
class Tally:
    """What came of all inputs so far."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    worst_seconds: float = 0.0
    worst_mebibytes: float = 0.0
    bugs: dict[str, Bug] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def note(self, bug: Bug) -> None:
        """Keep the shortest input of each bug."""
        if bug.key not in self.bugs or len(bug.data) < len(self.bugs[bug.key].data):
            self.bugs[bug.key] = bug


class Watch:
    """Runs inputs of one target in a folder of their own.

    Args:
        run: what is tried: returns, or raises `ValueError` for an input that it refuses. reaches: whether the input may
            name a model on the Hub. floor: mebibytes that may be taken beside `MEBIBYTES`.
    """

    def __init__(self, run: Callable[[bytes, Path], None], *, current: Path | None = None) -> None:
        self.run, self.current = run, current
        self.tally = Tally()
        self.home = Path(tempfile.mkdtemp(prefix="zipper-fuzz-"))
        self.folder = self.home / "in"
        for name in SECRETS:
            (self.home / name).write_bytes(b"nobody may read this")

    def __enter__(self) -> Watch:
        _hook.install()
        signal.signal(signal.SIGPROF, _interrupt)
        return self

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    def check(self, data: bytes) -> Bug | None:
        """Run one input. Returns the bug that it shows, if it shows one."""
        if self.current is not None:
            self.current.write_bytes(data)
        here = data.replace(OUTSIDE.encode(), str(self.home).encode())
        tally, bug, cpu, memory = self.tally, None, math.inf, 0.0
        known = tally.accepted, tally.refused
        for _ in range(TIMES):
            tally.accepted, tally.refused = known
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            bug, seconds, most = self._watched(here)
            cpu, memory = min(cpu, seconds), max(memory, most)
            if bug is not None or cpu <= CPU_SECONDS:
                break
        tally.inputs += 1
        tally.seconds += cpu
        tally.worst_seconds, tally.worst_mebibytes = max(tally.worst_seconds, cpu), max(tally.worst_mebibytes, memory)
        if bug is None and cpu > CPU_SECONDS:
            bug = Bug("slow", f"{cpu:.1f} s", data)
        if bug is None and memory > MEBIBYTES:
            bug = Bug("large", f"{memory:.0f} MiB", data)
        if bug is not None:
            bug.data = data
            tally.note(bug)
        return bug

    def _watched(self, data: bytes) -> tuple[Bug | None, float, float]:
        before = _resident()
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        try:
            with _hook.watching(self.home, self.folder):
                bug = self._outcome(data)
        except TooSlow as error:  # on its way out of what caught it
            bug = _bug("slow", error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        cpu = time.process_time() - begun
        return bug or _hook.told(), cpu, _peak() - before

    def _outcome(self, data: bytes) -> Bug | None:
        try:
            self.run(data, self.folder)
        except ValueError as error:
            self.tally.refused += 1
            if (memory := _of_memory(error)) is not None:
                return _bug("memory", memory)
            if not _is_ours(error):
                return _bug("foreign", error)
            self.tally.reasons[_place(error)] += 1
            return None
        except TooSlow as error:
            return _bug("slow", error)
        except Reached as error:
            return _bug("reached", error)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # PyO3's panics are no `Exception`
            return _bug("raised", error)
        self.tally.accepted += 1
        return None


def bound_memory(gibibytes: float = 3.0) -> None:
    """From now on, a great allocation fails at once, and is then seen, instead of taking the machine's memory."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + int(gibibytes * 2**30),) * 2)


class _Hook:
    """Python's own audit events, while an input is run, of whatever thread."""

    def __init__(self) -> None:
        self.home: str | None = None
        self.inside = ""
        self.reached: list[str] = []
        self.installed = False

    def install(self) -> None:
        if not self.installed:
            self.installed = True
            sys.addaudithook(self.audit)

    @contextmanager
    def watching(self, home: Path, inside: Path) -> Iterator[None]:
        self.home, self.inside, self.reached = str(home), str(inside) + os.sep, []
        try:
            yield
        finally:
            self.home = None

    def told(self) -> Bug | None:
        return (
            Bug(f"reached {self.reached[0].split(':')[0]}", "; ".join(self.reached[:3]), b"") if self.reached else None
        )

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self.home is None:
            return
        if event in _NEVER or event in _NETWORK:
            if event == "socket.connect" and not isinstance(args[1], tuple):
                return
            self._refuse(event, str(args[1:] if event.startswith("socket") else args[:2])[:120])
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(args[0]))
            if path.startswith(self.home + os.sep) and not (path + os.sep).startswith(self.inside):
                self._refuse("open", path)
            writes = isinstance(args[2], int) and args[2] & _WRITING
            if writes and not path.startswith((tempfile.gettempdir() + os.sep, "/dev/", "/proc/")):
                self._refuse("write", path)

    def _refuse(self, what: str, which: str) -> None:
        self.reached.append(f"{what}: {which}")
        raise Reached(f"{what}: {which}")


_hook = _Hook()


def _interrupt(*_: Any) -> None:
    raise TooSlow(f"more than {PATIENCE:g} s of the processor")


def _resident() -> float:
    """Mebibytes that are held now; the peak counts from here."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _status(name: str) -> float:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name):
                return int(line.split()[1]) / 1024
    return 0.0


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def _is_ours(error: BaseException) -> bool:
    """Whether our own code raised it; what the targets themselves refuse (`assert`-like) is theirs."""
    frames = _frames(error)
    return bool(frames) and frames[-1].filename.startswith((_OURS, _HERE))


def _place(error: BaseException) -> str:
    frame = _frames(error)[-1]
    return f"{Path(frame.filename).name}:{frame.name}:{frame.lineno}"


def _of_memory(error: BaseException | None) -> BaseException | None:
    """What in an error's causes says that memory was asked for which there is not."""
    for _ in range(20):
        if error is None:
            return None
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _bug(what: str, error: BaseException) -> Bug:
    frames = _frames(error)
    ours = [f for f in frames if f.filename.startswith(_OURS)]
    last = ours[-1] if ours else (frames[-1] if frames else None)
    place = f"{Path(last.filename).name}:{last.name}" if last else "?"
    kind = f"{what} {type(error).__name__} at {place}"
    told = "".join(traceback.format_exception(error, limit=-6))[-3000:]
    return Bug(kind, told, b"")
