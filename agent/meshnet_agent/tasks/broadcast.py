"""Something that happens again and again, and tasks that wait for the next time."""

from __future__ import annotations

import trio


class Broadcast:
    """Wakes all tasks that wait, each time.

    Unlike a `Flag` it remembers nothing: who begins to wait after it happened waits for the next.
    """

    def __init__(self) -> None:
        self._next = trio.Event()

    def send(self) -> None:
        """It has happened: whoever waits goes on."""
        self._next.set()
        self._next = trio.Event()

    async def wait(self) -> None:
        """Wait until it happens the next time."""
        await self._next.wait()
