"""The right of way: work that a caller waits for goes before work that only has to be done soon.

An attach takes a few milliseconds.  Thousands of changes of the mesh take half a second, in slices;
without the right of way the attach would wait for the interpreter after each of its system calls.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE_S = 0.05
"""Longest wait of one `give`: a stream of attaches must not stop the mesh from being followed."""


class RightOfWay:
    """Short work takes it; long work gives way between its slices."""

    def __init__(self) -> None:
        self._taken = 0
        self._free = trio.Event()
        self._free.set()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Have long work give way while the block runs; blocks of several tasks may overlap."""
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
        """Let other tasks run, and wait, for 50 ms at most, while one has the right of way."""
        await trio.lowlevel.checkpoint()
        if self._taken:
            with trio.move_on_after(_PATIENCE_S):
                await self._free.wait()
