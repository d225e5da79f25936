"""Several towers advance layer by layer together, each in its own family's forward.

Each tower's forward runs in a greenlet (a coroutine on the same thread, so autograd, autocast and no-grad hold as they
are). After every layer its listener posts the state that others read, waits where it reads states that are not there
yet, and goes on with the zipped state. Nothing of a family's forward is re-implemented.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import copy_context
from typing import TypeVar

from greenlet import getcurrent, greenlet
from torch import Tensor

from zipper_lm.fusion.tower import Listener
from zipper_lm.fusion.zip_spec import EMBEDDINGS

T = TypeVar("T")
Board = dict[tuple[str, int], Tensor]
"""(tower, depth) -> that tower's state after that layer, before its own zips; `EMBEDDINGS`: what enters its first."""


class _Member:
    """Listener of one tower in lockstep."""

    def __init__(
        self,
        name: str,
        board: Board,
        posts: set[int],
        needs: Mapping[int, list[tuple[str, int]]],
        enter: Callable[[str, int, Tensor], Tensor],
        update: Callable[[str, int, Tensor], Tensor],
    ) -> None:
        self.name, self.board, self.posts, self.needs = name, board, posts, needs
        self.enter, self.update = enter, update

    def before(self, depth: int, hidden_states: Tensor) -> Tensor:
        if depth == 0 and EMBEDDINGS in self.posts:
            self.board[self.name, EMBEDDINGS] = hidden_states
        return self.enter(self.name, depth, hidden_states)

    def after(self, depth: int, hidden_states: Tensor) -> Tensor:
        if depth in self.posts:
            self.board[self.name, depth] = hidden_states
        while any(need not in self.board for need in self.needs.get(depth, ())):
            getcurrent().parent.switch()
        return self.update(self.name, depth, hidden_states)


def lockstep(
    forwards: Mapping[str, Callable[[Listener], T]],
    board: Board,
    posts: Mapping[str, set[int]],
    needs: Mapping[str, Mapping[int, list[tuple[str, int]]]],
    enter: Callable[[str, int, Tensor], Tensor],
    update: Callable[[str, int, Tensor], Tensor],
) -> dict[str, T]:
    """Run every tower's forward, meeting at the zips.

    Args:
        forwards: per tower, its forward, given the listener to pass on.
        board: filled with posted states; `update` may read whatever its depth needs.
        posts: per tower, the depths whose states others read.
        needs: per tower and depth, the (tower, depth) states that must be posted before `update`.
        enter: (tower, depth, state before that layer) -> state that enters it.
        update: (tower, depth, state after that layer) -> state to go on with.

    Returns:
        What each forward returned.
    """
    results: dict[str, T] = {}
    running: dict[str, greenlet] = {}
    for name, forward in forwards.items():
        member = _Member(name, board, posts.get(name, set()), needs.get(name, {}), enter, update)

        def run(name: str = name, forward: Callable[[Listener], T] = forward, member: _Member = member) -> None:
            results[name] = forward(member)

        running[name] = greenlet(run)
        running[name].gr_context = copy_context()
    try:
        while len(results) < len(running):
            before = len(board) + len(results)
            for member_greenlet in running.values():
                if not member_greenlet.dead:
                    member_greenlet.switch()
            assert len(board) + len(results) > before, (
                "towers wait for each other: the config check let crossed zips by"
            )
    finally:
        for member_greenlet in running.values():
            if not member_greenlet.dead:  # another tower raised: unwind this one too
                member_greenlet.throw()
    return results
