"""Several processes, one a device, as `accelerate launch` and `torchrun` start them: who writes, and who waits.

Every process reads the data and trains. What falls into pieces (encoding, writing, judging, losses on held-out data) is
shared, piece by piece, and every process gets the results of all. Codecs and judges are fitted, and files written, by
the main process alone. In a single process nothing here does anything.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from rich.console import Console
from torch import Tensor

from zipper_lm.utils.progress import plain_console

T = TypeVar("T")

ROLL_CALL_SECONDS = 10.0
"""How long the processes that notice that another one is lost wait for each other's word."""


class PeerLost(ConnectionError):
    """Another process died, or did not come to where all wait for each other within the time limit."""


R = TypeVar("R")


def on_cpus() -> bool:
    """Whether a launcher started this process to compute on a CPU. Accelerate has to be told: else, on a machine
    without any accelerator, each process would take itself for the only one."""
    return "LOCAL_RANK" in os.environ and (
        parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    )


def _state() -> PartialState:
    return PartialState(cpu=on_cpus())


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return _state().is_main_process


def main_console() -> Console:
    """For people, on standard error; the main process alone is heard."""
    return plain_console(stderr=True, quiet=not is_main())


def several() -> bool:
    """Whether there is more than one process."""
    return _state().num_processes > 1


def rank_of() -> tuple[int, int]:
    """The number of this process, from 0, and of how many."""
    return _state().process_index, _state().num_processes


def on_this_machine() -> int:
    """How many processes share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", _state().num_processes))  # of torchrun and accelerate


def wait() -> None:
    """Go on when all processes are here."""
    _state().wait_for_everyone()


def from_main(value: T) -> T:
    """The main process's value, in every process; anything that can be pickled."""
    if not several():
        return value
    box = [value]
    broadcast_object_list(box)
    return box[0]


def made_by_main(make: Callable[[], T]) -> T:
    """What the main process makes, in every process; an error there is raised in every process too."""
    if not several():
        return make()
    made: T | None = None
    problem: ValueError | None = None
    if is_main():
        try:
            made = make()
        except ValueError as error:
            problem = error
    made, problem = from_main((made, problem))
    if problem is not None:
        raise problem
    return made  # type: ignore[return-value]


def shared(pieces: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
    """What each piece of work comes to, in order. Several processes take turns at the pieces, and each is given the
    results of all; so all of them go through it together, to its end.

    They meet once a round, not once at the end: an error is known soon, and nobody waits longer than a piece takes.

    Args:
        pieces: the same in all processes. work: does one. What comes of it is pickled, and must not depend on who does
            it, nor on the pieces before it.

    Raises:
        ValueError, RuntimeError: in all processes, for what `work` raised in one of them; there it is what it was.
    """
    if not several():
        yield from map(work, pieces)
        return
    rank, processes = rank_of()
    left = iter(pieces)
    while turn := list(islice(left, processes)):
        outcome, raised = _tried(work, turn[rank : rank + 1])
        for results, problem in gather_object([outcome]):
            if problem is not None:
                raise raised or problem
            yield from results


def _tried(work: Callable[[T], R], mine: list[T]) -> tuple[tuple[list[R], Exception | None], Exception | None]:
    """What a process tells the others, and what it raises itself."""
    try:
        return ([work(piece) for piece in mine], None), None
    except Exception as error:  # whatever it is, the others must not wait
        told: Any = ValueError(str(error)) if isinstance(error, ValueError) else None
        return ([], told or RuntimeError(f"process {rank_of()[0]}: {type(error).__name__}: {error}")), error


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    return bool(largest_of(int(flag)))


def any_of_each(flags: Tensor) -> list[bool]:
    """For each of some flags, bool ``[flags]`` on a process's device, whether it is true in any process."""
    if several():
        told = flags.int()
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        flags = told > 0
    return flags.tolist()


def largest_of(number: int) -> int:
    """The largest that any process has."""
    if not several():
        return number
    told = torch.tensor(number, device=_state().device)
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    return int(told)


def limit_waiting(seconds: float) -> None:
    """How long processes wait for each other from now on; transformers does not tell them where they are CPUs."""
    if several():
        torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))  # there is no public way to it


@contextmanager
def naming_lost_peers() -> Iterator[None]:
    """An error in the block that comes of another process that died or hangs becomes one that says which.

    The connection to a process that dies breaks at once; one that hangs is noticed after ``ddp_timeout``. Then all that
    have noticed it put their names into the store that they met by; who is missing there is lost.

    Raises:
        PeerLost: then, within `ROLL_CALL_SECONDS` of the first error.
    """
    try:
        yield
    except PeerLost:
        raise
    except Exception as error:
        if not _of_connection(error) or not several():
            raise
        missing, (rank, count) = _missing(ROLL_CALL_SECONDS), rank_of()
        who = f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))}" if missing else "a rank"
        raise PeerLost(
            f"{who} of {count} died, or hung for longer than the time limit "
            f"(training.arguments.ddp_timeout); this is rank {rank}. Checkpoints are kept: "
            "start all anew with resume (--resume)"
        ) from error


_OF_GLOO = ("gloo", "pair closure", "closed by peer", "reset by peer", "Timed out waiting")
"""Words of its errors. A pair that it has closed already, after a limit of time, is told without its name."""


def _of_connection(error: BaseException) -> bool:
    """Whether an error is of what processes send each other; gloo's have no class of their own, and some do not name
    it."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_GLOO)


def _missing(seconds: float) -> list[int]:
    """The ranks that do not say within so many seconds that they have noticed it, too. If the store itself is lost, it
    is the first rank, which keeps it, unless a launcher does."""
    rank, count = rank_of()
    others, heard = {n for n in range(count) if n != rank}, threading.Event()
    store: Any = torch.distributed.distributed_c10d._get_default_store()  # there is no public way to it

    def listen() -> None:
        with suppress(RuntimeError):
            store.set(_called(rank), "")
            end = time.monotonic() + seconds
            while others and time.monotonic() < end:
                others.difference_update([n for n in others if store.check([_called(n)])])
                time.sleep(0.1)
            heard.set()

    threading.Thread(target=listen, daemon=True).start()  # who keeps the store may hang: nothing limits that wait
    return sorted(others) if heard.wait(seconds + 1.0) else [0]


def _called(rank: int) -> str:
    return f"zipper/lost-a-peer/{rank}"
