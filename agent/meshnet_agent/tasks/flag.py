"""A coalescing event: many calls of `set` before the reader wakes count as one.

Event handlers set a flag instead of growing a queue.
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
        """Wait until it is raised, then lower it.  Cancellation leaves it as it is."""
        await self._event.wait()
        # Lowered before the caller looks at anything: what is set while it works wakes it again.
        self._event = trio.Event()
