"""What is counted beside what is counted of peers."""

from __future__ import annotations


class Counters:
    """Drops of packets that belong to no peer, by reason."""

    __slots__ = ("drops",)

    def __init__(self) -> None:
        self.drops: dict[str, int] = {}

    def drop(self, reason: str, count: int = 1) -> None:
        """Count packets that were dropped; `reason` is one of a few."""
        self.drops[reason] = self.drops.get(reason, 0) + count
