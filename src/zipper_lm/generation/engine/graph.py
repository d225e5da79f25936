"""A CUDA graph of a step: its kernels are launched by one call, whether they were compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM = 3
"""Calls before the capture, in which libraries choose kernels and take what memory they keep
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs)."""


def graph_pool(device: torch.device) -> Any:
    """Memory for the graphs of one step; `None` where there are no graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class Graph:
    """A function of no arguments over tensors at fixed addresses, captured.

    Args:
        run: the function; it may not wait for the GPU. Its result lies where the next call's will. state: what it
            writes to and reads again: afterwards as it was before. pool: of memory, shared by graphs that do not run at
            the same time.

    Raises:
        RuntimeError: if it cannot be captured; the state is as it was.
    """

    def __init__(self, run: Callable[[], Tensor], state: Sequence[Tensor], pool: Any = None) -> None:
        before = [tensor.clone() for tensor in state]

        def restore() -> None:
            for tensor, old in zip(state, before):
                tensor.copy_(old)

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(aside):
                for _ in range(WARM):
                    run()
                    restore()  # each call goes a column further, and there may be no further one
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile: the plain path's, and whoever trains.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.result = run()
        finally:
            restore()

    def __call__(self) -> Tensor:
        """Run it."""
        self.graph.replay()
        return self.result
