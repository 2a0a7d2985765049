"""A dedicated thread that owns one object, called from trio.

Netlink sockets and network namespaces belong to threads (setns(2) moves one thread alone), so each
object that uses them has a thread of its own.  Calls run in the order in which they were made.
"""

from __future__ import annotations

import queue
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import outcome
import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

_T = TypeVar("_T", covariant=True)
_R = TypeVar("_R")


class Worker(Protocol[_T]):
    """Owns one object, and makes calls on it for tasks, one at a time."""

    async def run(self, call: Callable[[_T], _R]) -> _R:
        """Call `call` with the owned object, and return or raise what it does."""
        ...


class ThreadWorker(Generic[_T]):
    """A thread that owns one object; see `open_worker`."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._owned: _T

    async def run(self, call: Callable[[_T], _R]) -> _R:
        """Call `call` with the owned object in the thread, and return or raise what it does.

        Cancellation waits until a call that is queued or running has ended: a kernel operation
        cannot be interrupted halfway.
        """
        return await self._submit(lambda: call(self._owned))

    async def _submit(self, call: Callable[[], _R]) -> _R:
        done = trio.Event()
        result: list[outcome.Outcome[_R]] = []

        def in_thread() -> None:
            result.append(outcome.capture(call))
            self._token.run_sync_soon(done.set)

        await trio.lowlevel.checkpoint_if_cancelled()
        self._calls.put(in_thread)
        with trio.CancelScope(shield=True):
            await done.wait()
        return result[0].unwrap()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    async def _start(self, make: Callable[[], _T]) -> None:
        self._thread.start()
        self._owned = await self._submit(make)

    async def _stop(self, close: Callable[[_T], None]) -> None:
        with trio.CancelScope(shield=True):
            if hasattr(self, "_owned"):  # not if `make` failed
                await self._submit(lambda: close(self._owned))
            self._calls.put(None)
            await trio.to_thread.run_sync(self._thread.join)


@asynccontextmanager
async def open_worker(
    name: str, make: Callable[[], _T], close: Callable[[_T], None]
) -> AsyncIterator[ThreadWorker[_T]]:
    """Start a thread that owns what `make` returns; it ends with the block.

    Args:
        name: the thread's name.
        make: runs in the thread; what it raises is raised here.
        close: runs in the thread at the end, even after an exception or cancellation.
    """
    worker: ThreadWorker[_T] = ThreadWorker(name)
    try:
        await worker._start(make)
        yield worker
    finally:
        await worker._stop(close)
