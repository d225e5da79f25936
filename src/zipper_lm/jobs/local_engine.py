"""Shards are written by processes of this machine."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import torch

from zipper_lm.jobs.shards import Encoder, Job, Shard
from zipper_lm.utils.interruption import end_with_parent

_encoder: Encoder | None = None  # of this process


def _start(job: Job) -> None:
    global _encoder
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process; a shard is finished first
    torch.set_num_threads(1)
    _encoder = Encoder(job)


def _write(shard: Shard) -> dict[str, Any]:
    assert _encoder is not None
    return _encoder.write(shard)


def by_processes(job: Job, shards: Iterator[Shard], processes: int) -> Generator[dict[str, Any], None, None]:
    """The note of each shard, in order: of an earlier run, or written now.

    Raises:
        BrokenProcessPool: if a process ended before its work was done.
    """
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (job,))
    waiting: deque[dict[str, Any] | Future[dict[str, Any]]] = deque()
    try:
        for shard in shards:
            waiting.append(job.note(shard) or pool.submit(_write, shard))
            if len(waiting) >= 2 * processes:  # no more of a stream in memory than that
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(note: dict[str, Any] | Future[dict[str, Any]]) -> dict[str, Any]:
    return note.result() if isinstance(note, Future) else note
