"""The right of way: what somebody waits for goes before what only has to be done soon.

An attach takes a few milliseconds.  Thousands of changes of the mesh take half a second, in pieces,
and would make it wait for its turn in the interpreter after every system call.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE_S = 0.05


class RightOfWay:
    """Taken by what is short; what is long gives way between its pieces."""

    def __init__(self) -> None:
        self._taken = 0
        self._free = trio.Event()
        self._free.set()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """While the block runs others give way."""
        self._taken += 1
        if self._free.is_set():
            self._free = trio.Event()
        try:
            yield
        finally:
            self._taken -= 1
            if not self._taken:
                self._free.set()

    async def give(self) -> None:
        """Let others run, and wait while somebody has the right of way, but not for long."""
        await trio.lowlevel.checkpoint()
        if self._taken:
            with trio.move_on_after(_PATIENCE_S):
                await self._free.wait()
