"""A step in many processes, each with a device of its own: what they send each other, and what it leaves of time.

Every process has a batch as large as the recipe's. A ring sends each byte of a sum nearly twice (Patarasuk and Yuan
2009): of N processes each sends and receives 2 (N - 1) / N of the gradients' bytes for DDP, once a step. FSDP2 gathers
what is trained for the forward and for the backward pass of each batch, and scatters sums of gradients after each:
three times (N - 1) / N of its bytes a batch. Frozen towers are whole in each process and never sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IN_A_MACHINE, ACROSS, MACHINE = 300.0, 40.0, 8
"""Assumed: GB/s that a process sends within a machine of so many processes, and across machines. Eight GPUs by NVLink
have 450 GB/s one way by their data sheet, a network card of 400 Gb/s for each has 50: two thirds and four fifths."""


def project(
    processes: Sequence[int],
    *,
    seconds: float,
    steps: int,
    documents: int,
    micro: int,
    gradients: int,
    memory: Mapping[str, Any],
    unit: int,
    room: float,
    interconnect: float | None = None,
) -> list[dict[str, Any]]:
    """What a step takes in so many processes, by DDP and by FSDP2.

    Args:
        processes: numbers of them. seconds: of a step in one. steps: of the run in one process.
        documents: of a step in each process. micro: batches that are accumulated in it.
        gradients: bytes of what is sent. memory: of one process, from `plan`. unit: bytes that are gathered at once.
        room: bytes of a device. interconnect: GB/s of a process; `None`: as assumed above.

    Returns:
        For each number and kind: bytes that a process sends in a step, seconds of it (at least: all is hidden behind
        computing; at most: nothing is), efficiency at the least, documents a second at the least, hours until as many
        documents are seen as in the run of one process, memory of a process and whether it fits.
    """
    rows = []
    for number in processes:
        speed = 1e9 * (interconnect or (IN_A_MACHINE if number <= MACHINE else ACROSS))
        share = (number - 1) / number
        for kind, sent in (("ddp", 2 * share * gradients), ("fsdp", 3 * micro * share * gradients)):
            sending = sent / speed
            most = seconds + sending
            rows.append(
                {
                    "processes": number,
                    "kind": kind,
                    "sent": sent,
                    "interconnect": speed,
                    "step_seconds": [max(seconds, sending), most],
                    "efficiency": seconds / most,
                    "documents_per_second": number * documents / most,
                    "hours": steps / number * most / 3600,
                    **_memory(kind, number, memory, gradients, unit, room),
                }
            )
    return rows


def _memory(
    kind: str, number: int, memory: Mapping[str, Any], gradients: int, unit: int, room: float
) -> dict[str, Any]:
    """Bytes of a process: by DDP buckets as large as all gradients come to the rest; FSDP2 spreads what is trained, its
    gradients and the optimizer's state, and holds two units gathered."""
    total = memory["total"]
    if number > 1 and kind == "ddp":
        total += gradients
    if number > 1 and kind == "fsdp":
        spread = memory["trained_weights"] + memory["gradients"] + memory["optimizer"]
        total = total - spread + spread / number + 2 * unit
    return {"memory": total, "fits": total <= room}
