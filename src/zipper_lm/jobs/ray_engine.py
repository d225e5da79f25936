"""Shards are written by the machines of a Ray cluster, as Ray Data deals them out: ``zipper prepare --engine ray``.

All of them see the working folder, the data and the towers at the same place. A task is a shard: when a worker or a
machine dies, Ray gives its shards to another, and what was half written never had its name.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from zipper_lm.jobs.recipes.schema import DataRecipe
from zipper_lm.jobs.shards import Encoder, Job, Shard

TRIES = 3
"""How often a shard is given to another worker, after one that died with it."""


def check_ray(data: DataRecipe) -> None:
    """Raise `ValueError` where shards cannot be written by a cluster."""
    if find_spec("ray") is None or find_spec("ray.data") is None:
        raise ValueError('engine "ray" needs Ray Data: pip install "zipper-lm[ray]"')
    if data.streaming:
        raise ValueError(
            'engine "ray" cannot be fed by data.streaming: a stream is read in one place; use engine "local"'
        )


def by_cluster(job: Job, shards: Sequence[Shard], processes: int) -> Generator[dict[str, Any], None, None]:
    """The note of each shard, in order: of an earlier run, or written now.

    Args:
        job: what every worker needs to know. shards: to be written. processes: that encode at once, on all machines.

    Raises:
        ValueError: as `Encoder.write`.
        BrokenProcessPool: if `TRIES` workers died with one shard.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray tells its makers how it is used
    import ray

    notes = [job.note(shard) for shard in shards]
    todo = [number for number, note in enumerate(notes) if note is None]
    ours = not ray.is_initialized()
    if ours:  # a cluster that RAY_ADDRESS names, or one of this machine
        address = os.environ.get("RAY_ADDRESS", "local")
        alone: dict[str, Any] = {"num_cpus": processes, "include_dashboard": False} if address == "local" else {}
        ray.init(address=address, log_to_driver=False, configure_logging=False, **alone)
    try:
        written = _written(job, [shards[number] for number in todo], processes)
        for note in notes:
            yield note or next(written)
    finally:
        if ours:
            ray.shutdown()


def _written(job: Job, shards: list[Shard], processes: int) -> Generator[dict[str, Any], None, None]:
    import ray
    from ray.data import DataContext, TaskPoolStrategy

    if not shards:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # what is broken is told in the order of the rows
    known = ray.put((job, shards, os.getcwd()))
    rows = ray.data.from_items([{"number": n} for n in range(len(shards))], override_num_blocks=len(shards))
    mapped = rows.map(_Write(known), compute=TaskPoolStrategy(size=processes), num_cpus=1, max_retries=TRIES)
    try:
        for row in mapped.iter_rows():
            told = json.loads(row["told"])
            if "error" in told:
                raise ValueError(told["error"])
            yield told
    except ray.exceptions.RayError as error:
        raise BrokenProcessPool(str(error)) from error


class _Write:
    """What a task does, in whatever process of the cluster."""

    def __init__(self, known: Any) -> None:
        self.known = known  # in Ray's store, from which each process fetches it once

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            encoder, shards = _encoder(self.known)
            note = encoder.write(shards[row["number"]])
        except ValueError as error:
            note = {"error": str(error)}
        return {"told": json.dumps(note)}


@functools.lru_cache(maxsize=1)
def _encoder(known: Any) -> tuple[Encoder, list[Shard]]:
    """Of this process; codecs are loaded once.

    Raises:
        ValueError: if this machine does not see the working folder.
    """
    import ray

    job, shards, folder = ray.get(known)
    if not (Path(folder) / job.working).is_dir():
        raise ValueError(
            f"{os.uname().nodename} does not see {Path(folder) / job.working}: all machines of the cluster need the "
            "same folders for data, towers and output"
        )
    os.chdir(folder)  # from which the recipe's paths start
    torch.set_num_threads(1)
    return Encoder(job), shards
