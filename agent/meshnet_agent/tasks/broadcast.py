"""An event that happens again and again, for tasks that wait for its next occurrence."""

from __future__ import annotations

import trio


class Broadcast:
    """Wakes all waiting tasks each time it happens.

    Unlike a `Flag` it remembers nothing: a task that starts to wait afterwards waits for the next
    time.
    """

    def __init__(self) -> None:
        self._next = trio.Event()

    def send(self) -> None:
        """Wake all tasks that wait now."""
        self._next.set()
        self._next = trio.Event()

    async def wait(self) -> None:
        """Wait until the next `send`."""
        await self._next.wait()
