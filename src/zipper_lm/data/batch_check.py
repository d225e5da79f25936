"""Whether a batch is one, before towers run on it: what is wrong is said here by name, not deep in a backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zipper_lm.data.collation import IGNORED
from zipper_lm.utils.host import on_host

STREAM_KEYS = ("input_ids", "attention_mask", "segments", "positions", "labels", "handover")
FLAGS = "involved"
PACKED = "documents"
KNOWN = "known"
"""Which may be there too: states ``[batch, time, kept, hidden]`` of a frozen tower (`zipper_lm.fusion.prefix`)."""


def check_batch(batch: Any, names: Sequence[str], check_ids: Callable[[str, int, int], None]) -> None:
    """Raise `ValueError` if a batch is not as `collate` makes it.

    Args:
        batch: by tower, int64 ``[batch, time]`` of each of `STREAM_KEYS`, and bool `involved` ``[batch, towers]``;
            where documents share rows, int64 `documents` ``[batch, time]`` in all towers.
        names: all towers of the model. check_ids: raises for ids from a low to a high one that a tower does not have.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"batch is a {type(batch).__name__}: it must map towers to streams, as model.processor gives it"
        )
    if not batch:
        raise ValueError("batch: no tower has any token")
    rows: dict[str, int] = {}
    for name, stream in batch.items():
        rows[name] = _check_stream(name, stream, len(names))
    if len(set(rows.values())) > 1:
        raise ValueError(f"batch: its towers have different numbers of rows: {rows}")
    if len(packed := {name: PACKED in stream for name, stream in batch.items()}) > 1 and len(set(packed.values())) > 1:
        raise ValueError(f"batch: documents share rows in all of its towers or in none; {PACKED!r} is in {packed}")
    for name, stream in batch.items():
        _check_values(name, stream, len(names), check_ids)


def _check_stream(name: str, stream: Any, towers: int) -> int:
    """Keys, dtypes and shapes of one tower's side. Returns the number of rows."""
    where = f"batch[{name!r}]"
    if not isinstance(stream, Mapping):
        raise ValueError(f"{where} is a {type(stream).__name__}: it must hold {[*STREAM_KEYS, FLAGS]}")
    wanted = {*STREAM_KEYS, FLAGS}
    if missing := sorted(wanted - set(stream)):
        raise ValueError(f"{where} lacks {missing}; collate and the processor give all of {sorted(wanted)}")
    if unknown := sorted(map(str, set(stream) - wanted - {PACKED, KNOWN})):
        raise ValueError(f"{where} has {unknown}, which nothing reads; a stream has {sorted(wanted)}")
    known = stream.get(KNOWN)
    if known is not None and (not isinstance(known, Tensor) or known.ndim != 4 or not known.is_floating_point()):
        raise ValueError(f"{where}[{KNOWN!r}] must be a floating-point tensor [batch, time, kept, hidden]")
    for key, tensor in stream.items():
        if key == KNOWN:
            continue
        kind = torch.bool if key == FLAGS else torch.int64
        also = torch.int32 if key in ("input_ids", "attention_mask") else kind  # which are only looked up
        if not isinstance(tensor, Tensor) or tensor.dtype not in (kind, also):
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{where}[{key!r}] is {got}, it must be a tensor of {kind}")
    shape = tuple(stream["input_ids"].shape)
    if len(shape) != 2 or not all(shape):
        raise ValueError(f"{where}['input_ids'] is {list(shape)}, it must be [batch, time], neither empty")
    for key in (*STREAM_KEYS, *({PACKED} & set(stream))):
        if tuple(stream[key].shape) != shape:
            raise ValueError(f"{where}[{key!r}] is {list(stream[key].shape)}, input_ids are {list(shape)}")
    if known is not None and tuple(known.shape[:2]) != shape:
        raise ValueError(f"{where}[{KNOWN!r}] is {list(known.shape)}, input_ids are {list(shape)}")
    if tuple(stream[FLAGS].shape) != (shape[0], towers):
        raise ValueError(f"{where}[{FLAGS!r}] is {list(stream[FLAGS].shape)}, it must be {[shape[0], towers]}")
    return shape[0]


def _check_values(name: str, stream: Mapping[str, Tensor], towers: int, check_ids: Callable[..., None]) -> None:
    """Ranges of what is looked up."""
    ids, labels, handover = (on_host(stream[key]) for key in ("input_ids", "labels", "handover"))
    labels, handover = (tensor.where(tensor != IGNORED, 0) for tensor in (labels, handover))
    ends = [int(end) for tensor in (ids, labels, handover) for end in tensor.aminmax()]
    low, high, label_low, label_high, next_low, next_high = ends
    check_ids(name, low, high)
    try:
        check_ids(name, label_low, label_high)
    except ValueError as error:
        raise ValueError(f"labels: {error}; what no loss counts is {IGNORED}") from error
    if next_low < 0 or next_high > towers:
        raise ValueError(
            f"batch[{name!r}]['handover'] has {next_low if next_low < 0 else next_high}: it must be a tower from 0 to "
            f"{towers - 1}, {towers} for the end, or {IGNORED}"
        )
