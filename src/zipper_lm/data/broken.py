"""Items that cannot be read: left out, counted, each with its reason, up to a limit."""

from __future__ import annotations

from collections.abc import Iterable

SHOWN = 3


class Broken:
    """The items that were left out.

    Args:
        limit: how many may be; 0: the first one is an error.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.items: list[dict[str, str]] = []
        """Of each, ``source`` (where it comes from) and ``reason``."""

    def add(self, where: str, reason: object) -> None:
        """Leave one out.

        Raises:
            ValueError: if that is one too many; the message shows the first few.
        """
        self.extend([{"source": where, "reason": str(reason)}])

    def extend(self, items: Iterable[dict[str, str]]) -> None:
        """Leave several out.

        Raises:
            ValueError: as `add`.
        """
        self.items += items
        if len(self.items) > self.limit:
            most = f": more broken items than data.broken_limit={self.limit}, the first are" if self.limit else ""
            raise ValueError(f"data{most} {self._shown(SHOWN if self.limit else 1)}")

    def told(self) -> str:
        """How many, and the first few."""
        return f"{len(self.items)} broken items left out, the first are {self._shown(SHOWN)}"

    def _shown(self, count: int) -> str:
        return "; ".join(f"{item['source']}: {item['reason']}" for item in self.items[:count])
