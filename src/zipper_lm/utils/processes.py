"""Several processes, one a device, as `accelerate launch` and `torchrun` start them: who writes, and who waits.

Every process reads the data, trains, and scores (all go by the main one's scores); codecs and judges are fitted, and
files written, by the main process alone. In a single process nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from torch import Tensor

from zipper_lm.utils.progress import plain_console

T = TypeVar("T")


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return PartialState().is_main_process


def main_console() -> Console:
    """For people, on standard error; the main process alone is heard."""
    return plain_console(stderr=True, quiet=not is_main())


def several() -> bool:
    """Whether there is more than one process."""
    return PartialState().num_processes > 1


def rank_of() -> tuple[int, int]:
    """The number of this process, from 0, and of how many."""
    return PartialState().process_index, PartialState().num_processes


def on_this_machine() -> int:
    """How many processes share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", PartialState().num_processes))  # of torchrun and accelerate


def wait() -> None:
    """Go on when all processes are here."""
    PartialState().wait_for_everyone()


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
    told = torch.tensor(number, device=PartialState().device)
    torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
    return int(told)
