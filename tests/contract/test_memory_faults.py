"""Tests of what only the store in memory can do: jump in time, and fail on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from meshnet.errors import StoreUnavailableError, UsageError
from meshnet.store import Change, LeaseExpiredError, Put
from meshnet.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from meshnet.store import WatchBatch


async def next_changes(watch: AsyncIterator[WatchBatch]) -> tuple[Change, ...]:
    """The next batch that holds changes."""
    async for batch in watch:
        if batch.changes:
            return batch.changes
    pytest.fail("the watch ended")


async def test_a_waiting_watch_sees_a_lease_run_out_on_time(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    async with store.watch_prefix("/", after_revision=1) as watch:
        lease_id = await store.grant_lease(3_600)
        await store.commit([], [Put("/k", b"", lease_id)])
        assert await next_changes(watch) == (Change("/k", b"", 2),)
        began = trio.current_time()
        assert await next_changes(watch) == (Change("/k", None, 3),)
        assert trio.current_time() - began == pytest.approx(3_600)


async def test_a_lease_granted_while_a_watch_waits(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    long_lease = await store.grant_lease(1_000)
    await store.commit([], [Put("/long", b"", long_lease)])

    async def grant_a_shorter_one() -> None:
        await trio.sleep(0.5)
        short_lease = await store.grant_lease(1)
        await store.commit([], [Put("/short", b"", short_lease)])

    async with (
        trio.open_nursery() as nursery,
        store.watch_prefix("/short", after_revision=0) as watch,
    ):
        nursery.start_soon(grant_a_shorter_one)
        await next_changes(watch)
        (change,) = await next_changes(watch)
        assert change.value is None
        assert trio.current_time() == pytest.approx(1.5)


async def test_renewing_moves_the_end(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    lease_id = await store.grant_lease(10)
    for _ in range(3):
        await trio.sleep(9)
        assert await store.keep_alive(lease_id) == 10
    await trio.sleep(10)
    with pytest.raises(LeaseExpiredError):
        await store.keep_alive(lease_id)


async def test_unavailable_fails_calls_and_breaks_watches(autojump_clock: MockClock) -> None:
    store = MemoryStore()
    lease_id = await store.grant_lease(60)
    async with store.watch_prefix("/", after_revision=0) as watch:
        store.set_available(False)
        with pytest.raises(StoreUnavailableError):
            await anext(watch)
        for call in (
            lambda: store.list_prefix("/"),
            lambda: store.commit([], []),
            lambda: store.grant_lease(60),
            lambda: store.keep_alive(lease_id),
            lambda: store.revoke_lease(lease_id),
            lambda: store.watch_prefix("/", after_revision=0).__aenter__(),
        ):
            with pytest.raises(StoreUnavailableError, match="made unavailable"):
                await call()
        store.set_available(True)
        with pytest.raises(StoreUnavailableError):  # a broken stream stays broken
            await anext(watch)
    assert await store.keep_alive(lease_id) == 60


async def test_one_client_is_cut_off_and_the_others_see_its_lease_end(
    autojump_clock: MockClock,
) -> None:
    store = MemoryStore()
    cut_off = store.connect()
    lease_id = await cut_off.grant_lease(15)
    await cut_off.commit([], [Put("/hosts/a", b"", lease_id)])
    async with store.watch_prefix("/", after_revision=2) as watch:
        cut_off.set_available(False)
        assert await next_changes(watch) == (Change("/hosts/a", None, 3),)
    cut_off.set_available(True)
    assert (await cut_off.list_prefix("/")).revision == 3
    with pytest.raises(LeaseExpiredError):
        await cut_off.keep_alive(lease_id)


async def test_compacting_what_is_not_there() -> None:
    store = MemoryStore()
    revision = (await store.commit([], [Put("/k", b"")])).revision
    with pytest.raises(UsageError):
        store.compact(revision + 1)
    store.compact(revision)
    with pytest.raises(UsageError):
        store.compact(revision)
