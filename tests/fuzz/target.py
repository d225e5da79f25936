"""What is fuzzed: a name, valid inputs to begin with, how others are made of them, and what is done with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from hypothesis.strategies import SearchStrategy


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of untrusted input.

    Args:
        name: of its folder in the corpus.
        run: takes an input's bytes and an empty folder; returns, or raises `ValueError` as our code does.
        share: inputs of a thousand.
        inputs: strategy of inputs, where they have a grammar.
        seeds: valid inputs, where they are bytes; coverage leads from these.
        change: one change of bytes that knows their form, such as checksums.
        instrument: packages whose coverage leads.
        around: what holds while inputs are run, such as a server.
    """

    name: str
    run: Callable[[bytes, Path], None]
    share: int
    inputs: SearchStrategy[bytes] | None = None
    seeds: Sequence[bytes] = ()
    change: Callable[[bytes, Random], bytes] | None = None
    instrument: Sequence[str] = ()
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
