"""A coalescing event: many `set`s before the reader comes are one.

What event handlers set instead of growing a queue.
"""

from __future__ import annotations

import trio


class Flag:
    """Set by anyone, waited for and lowered by one task."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        """Raise the flag."""
        self._event.set()

    @property
    def is_set(self) -> bool:
        """Whether it is raised."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Wait until it is raised, then lower it."""
        await self._event.wait()
        self._event = trio.Event()
