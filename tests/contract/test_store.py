"""What `meshnet.store.Store` promises, held against the fake and against a real etcd."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from meshnet.errors import StoreUnavailableError, UsageError
from meshnet.store import (
    Absent,
    Change,
    Commit,
    CompactedError,
    Delete,
    DeletePrefix,
    Holds,
    LeaseExpiredError,
    PrefixEmpty,
    Put,
    Unchanged,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from meshnet.store import Condition, LeaseId, Store, WatchBatch, Write

    from .conftest import StoreUnderTest

_DEADLINE_S = 15


async def put(store: Store, key: str, value: bytes, lease_id: LeaseId | None = None) -> int:
    """Write one key; returns the revision."""
    outcome = await store.commit([], [Put(key, value, lease_id)])
    assert outcome.succeeded
    return outcome.revision


async def collect(watch: AsyncIterator[WatchBatch], count: int) -> list[Change]:
    """The next `count` changes; no batch may hold more."""
    changes: list[Change] = []
    with trio.fail_after(_DEADLINE_S):
        while len(changes) < count:
            batch = await anext(watch)
            changes += batch.changes
            assert all(change.revision <= batch.revision for change in batch.changes)
    assert len(changes) == count
    return changes


class TestList:
    async def test_an_unused_prefix_is_empty(self, store: Store, prefix: str) -> None:
        listing = await store.list_prefix(prefix)
        assert listing.items == ()
        assert listing.revision >= 1
        assert listing.cluster_id != 0

    async def test_keys_come_in_order_with_their_last_write(
        self, store: Store, prefix: str
    ) -> None:
        second = await put(store, f"{prefix}b", b"2")
        await put(store, f"{prefix}a", b"0")
        third = await put(store, f"{prefix}a", b"1")
        listing = await store.list_prefix(prefix)
        assert [(kv.key, kv.value, kv.mod_revision, kv.lease_id) for kv in listing.items] == [
            (f"{prefix}a", b"1", third, 0),
            (f"{prefix}b", b"2", second, 0),
        ]
        assert listing.revision == third

    async def test_neighbouring_keys_are_not_listed(self, store: Store, prefix: str) -> None:
        for name in ("m", "m/1", "m0", "l", "n"):
            await put(store, prefix + name, b"")
        listing = await store.list_prefix(f"{prefix}m/")
        assert [kv.key for kv in listing.items] == [f"{prefix}m/1"]

    async def test_keys_and_values_are_kept_as_they_are(self, store: Store, prefix: str) -> None:
        key = f"{prefix}Zürich \x00 网络 \U0010ffff"
        await put(store, key, bytes(range(256)))
        (kv,) = (await store.list_prefix(prefix)).items
        assert (kv.key, kv.value) == (key, bytes(range(256)))

    async def test_reading_one_key(self, store: Store, prefix: str) -> None:
        first = await put(store, f"{prefix}k", b"1")
        last = await put(store, f"{prefix}k2", b"2")
        found = await store.read(f"{prefix}k")
        assert [(kv.key, kv.value, kv.mod_revision) for kv in found.items] == [
            (f"{prefix}k", b"1", first)
        ]
        assert found.revision == last
        assert found.cluster_id == (await store.list_prefix(prefix)).cluster_id
        for absent in (prefix, f"{prefix}k22", f"{prefix}j"):
            assert (await store.read(absent)).items == ()

    @pytest.mark.parametrize("count", [4_999, 5_000, 5_001, 15_000, 15_001])
    async def test_pages_make_one_listing(self, store: Store, prefix: str, count: int) -> None:
        keys = [f"{prefix}{number:05}" for number in range(count)]
        await fill(store, keys)
        listing = await store.list_prefix(prefix)
        assert [kv.key for kv in listing.items] == keys


async def fill(store: Store, keys: Sequence[str]) -> None:
    for start in range(0, len(keys), 100):
        await store.commit([], [Put(key, key.encode()) for key in keys[start : start + 100]])


class TestCommit:
    @pytest.mark.parametrize(
        ("keys", "condition", "holds"),
        [
            ({}, lambda p, _: Absent(f"{p}k"), True),
            ({"k": b""}, lambda p, _: Absent(f"{p}k"), False),
            ({"k": b"v"}, lambda p, _: Holds(f"{p}k", b"v"), True),
            ({"k": b"v"}, lambda p, _: Holds(f"{p}k", b"w"), False),
            ({"k": b""}, lambda p, _: Holds(f"{p}k", b""), True),
            ({}, lambda p, _: Holds(f"{p}k", b""), False),
            ({"k": b"v"}, lambda p, revision: Unchanged(f"{p}k", revision), True),
            ({"k": b"v"}, lambda p, revision: Unchanged(f"{p}k", revision - 1), False),
            ({"k": b"v"}, lambda p, _: Unchanged(f"{p}k", 0), False),
            ({}, lambda p, _: Unchanged(f"{p}k", 0), True),
            ({}, lambda p, _: PrefixEmpty(f"{p}d/"), True),
            ({"d": b"", "d0": b""}, lambda p, _: PrefixEmpty(f"{p}d/"), True),
            ({"d/": b""}, lambda p, _: PrefixEmpty(f"{p}d/"), False),
            ({"d/k": b"v"}, lambda p, _: PrefixEmpty(f"{p}d/"), False),
            ({"d/a": b"1", "d/b": b"2", "d/c": b"3"}, lambda p, _: PrefixEmpty(f"{p}d/"), False),
        ],
    )
    async def test_condition(
        self,
        store: Store,
        prefix: str,
        keys: dict[str, bytes],
        condition: Callable[[str, int], Condition],
        holds: bool,
    ) -> None:
        revision = 0
        for name, value in keys.items():
            revision = await put(store, prefix + name, value)
        outcome = await store.commit([condition(prefix, revision)], [Put(f"{prefix}~written", b"")])
        assert outcome.succeeded is holds
        written = (await store.list_prefix(f"{prefix}~written")).items
        assert bool(written) is holds

    async def test_a_deleted_key_is_absent_again(self, store: Store, prefix: str) -> None:
        await put(store, f"{prefix}k", b"")
        await store.commit([], [Delete(f"{prefix}k")])
        outcome = await store.commit(
            [Absent(f"{prefix}k"), Unchanged(f"{prefix}k", 0), PrefixEmpty(prefix)], []
        )
        assert outcome.succeeded

    async def test_every_condition_must_hold(self, store: Store, prefix: str) -> None:
        revision = await put(store, f"{prefix}k", b"v")
        outcome = await store.commit(
            [Holds(f"{prefix}k", b"v"), Absent(f"{prefix}x"), Absent(f"{prefix}k")],
            [Delete(f"{prefix}k")],
        )
        assert outcome == Commit(False, revision)
        assert len((await store.list_prefix(prefix)).items) == 1

    async def test_all_writes_are_of_one_revision(self, store: Store, prefix: str) -> None:
        for name in ("old", "gone", "d/1", "d/2", "e"):
            before = await put(store, prefix + name, b"0")
        outcome = await store.commit(
            [],
            [
                Put(f"{prefix}new", b"1"),
                Put(f"{prefix}old", b"2"),
                Delete(f"{prefix}gone"),
                DeletePrefix(f"{prefix}d/"),
            ],
        )
        assert outcome == Commit(True, before + 1)
        items = (await store.list_prefix(prefix)).items
        assert {(kv.key, kv.value, kv.mod_revision) for kv in items} == {
            (f"{prefix}new", b"1", before + 1),
            (f"{prefix}old", b"2", before + 1),
            (f"{prefix}e", b"0", before),
        }
        async with store.watch_prefix(prefix, after_revision=before) as watch:
            changes = await collect(watch, 5)
        assert changes == [
            Change(f"{prefix}new", b"1", before + 1),
            Change(f"{prefix}old", b"2", before + 1),
            Change(f"{prefix}gone", None, before + 1),
            Change(f"{prefix}d/1", None, before + 1),
            Change(f"{prefix}d/2", None, before + 1),
        ]

    @pytest.mark.parametrize("write", [Delete, DeletePrefix])
    async def test_deleting_nothing_makes_no_revision(
        self, store: Store, prefix: str, write: type[Delete | DeletePrefix]
    ) -> None:
        revision = await put(store, f"{prefix}k", b"")
        assert await store.commit([], [write(f"{prefix}x")]) == Commit(True, revision)

    async def test_writing_the_same_value_is_a_write(self, store: Store, prefix: str) -> None:
        first = await put(store, f"{prefix}k", b"v")
        assert await put(store, f"{prefix}k", b"v") == first + 1

    @pytest.mark.parametrize(
        "writes",
        [
            lambda p: [Put(f"{p}k", b"1"), Put(f"{p}k", b"2")],
            lambda p: [Put(f"{p}k", b"1"), Delete(f"{p}k")],
            lambda p: [DeletePrefix(p), Put(f"{p}k", b"1")],
            lambda p: [Put(f"{p}ok", b""), Put("", b"")],
            lambda p: [Put(f"{p}{number}", b"") for number in range(129)],
        ],
        ids=["twice", "put and delete", "put and delete prefix", "no key", "too many"],
    )
    async def test_a_senseless_transaction_is_refused_whole(
        self, store: Store, prefix: str, writes: Callable[[str], list[Write]]
    ) -> None:
        with pytest.raises(UsageError):
            await store.commit([], writes(prefix))
        assert (await store.list_prefix(prefix)).items == ()

    async def test_the_largest_transaction(self, store: Store, prefix: str) -> None:
        writes = [Put(f"{prefix}{number}", b"") for number in range(128)]
        assert (await store.commit([], writes)).succeeded

    async def test_only_one_of_many_rivals_wins(self, store: Store, prefix: str) -> None:
        winners: list[int] = []

        async def take(rival: int) -> None:
            outcome = await store.commit(
                [Absent(f"{prefix}owner")], [Put(f"{prefix}owner", str(rival).encode())]
            )
            if outcome.succeeded:
                winners.append(rival)

        async with trio.open_nursery() as nursery:
            for rival in range(20):
                nursery.start_soon(take, rival)
        (winner,) = winners
        (kv,) = (await store.list_prefix(prefix)).items
        assert kv.value == str(winner).encode()

    async def test_compare_and_swap_loses_no_increment(self, store: Store, prefix: str) -> None:
        await put(store, f"{prefix}n", b"0")

        async def increment() -> None:
            done = False
            while not done:
                (kv,) = (await store.list_prefix(f"{prefix}n")).items
                done = (
                    await store.commit(
                        [Unchanged(kv.key, kv.mod_revision)],
                        [Put(kv.key, str(int(kv.value) + 1).encode())],
                    )
                ).succeeded

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(increment)
        (kv,) = (await store.list_prefix(prefix)).items
        assert kv.value == b"10"


class TestSize:
    """Ten thousand hosts."""

    async def test_a_prefix_of_very_many_keys_is_deleted_at_once(
        self, store: Store, prefix: str
    ) -> None:
        keys = [f"{prefix}{number:05}" for number in range(10_000)]
        await fill(store, keys)
        start = (await store.list_prefix(prefix)).revision
        outcome = await store.commit([], [DeletePrefix(prefix)])
        assert outcome == Commit(True, start + 1)
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            changes = await collect(watch, len(keys))
        assert {change.key for change in changes} == set(keys)
        assert {(change.value, change.revision) for change in changes} == {(None, start + 1)}

    async def test_a_watch_catches_up_with_very_many_changes(
        self, store: Store, prefix: str
    ) -> None:
        start = await put(store, f"{prefix}first", b"")
        keys = [f"{prefix}{number:05}" for number in range(3_000)]
        await fill(store, keys)
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            changes = await collect(watch, len(keys))
        assert [change.key for change in changes] == keys


class TestLease:
    async def test_a_lease_that_runs_out_takes_its_keys_along(
        self, store: Store, prefix: str
    ) -> None:
        kept, dying = await store.grant_lease(2), await store.grant_lease(2)
        await put(store, f"{prefix}kept", b"", kept)
        await put(store, f"{prefix}a", b"", dying)
        start = await put(store, f"{prefix}b", b"", dying)

        async def renew() -> None:
            while True:
                assert await store.keep_alive(kept) >= 2
                await trio.sleep(0.3)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(renew)
            async with store.watch_prefix(prefix, after_revision=start) as watch:
                changes = await collect(watch, 2)
            nursery.cancel_scope.cancel()
        assert changes == [
            Change(f"{prefix}a", None, start + 1),
            Change(f"{prefix}b", None, start + 1),
        ]
        (kv,) = (await store.list_prefix(prefix)).items
        assert (kv.key, kv.lease_id) == (f"{prefix}kept", kept)
        with pytest.raises(LeaseExpiredError):
            await store.keep_alive(dying)
        await store.revoke_lease(kept)

    async def test_revoking_takes_the_keys_along(self, store: Store, prefix: str) -> None:
        lease_id = await store.grant_lease(60)
        assert lease_id != 0
        assert await store.keep_alive(lease_id) == 60
        await put(store, f"{prefix}free", b"")
        for name in ("a", "b"):
            start = await put(store, prefix + name, b"", lease_id)
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            await store.revoke_lease(lease_id)
            changes = await collect(watch, 2)
        assert {change.revision for change in changes} == {start + 1}
        assert [kv.key for kv in (await store.list_prefix(prefix)).items] == [f"{prefix}free"]

    async def test_a_revoked_lease_is_unknown(self, store: Store, prefix: str) -> None:
        lease_id = await store.grant_lease(60)
        await store.revoke_lease(lease_id)
        await store.revoke_lease(lease_id)  # not an error
        with pytest.raises(LeaseExpiredError):
            await store.keep_alive(lease_id)
        with pytest.raises(LeaseExpiredError):
            await store.commit([], [Put(f"{prefix}x", b""), Put(f"{prefix}y", b"", lease_id)])
        assert (await store.list_prefix(prefix)).items == ()

    async def test_an_unknown_lease_does_not_matter_when_a_condition_fails(
        self, store: Store, prefix: str
    ) -> None:
        lease_id = await store.grant_lease(60)
        await store.revoke_lease(lease_id)
        await put(store, f"{prefix}k", b"")
        outcome = await store.commit([Absent(f"{prefix}k")], [Put(f"{prefix}y", b"", lease_id)])
        assert not outcome.succeeded

    async def test_a_later_write_decides_about_the_lease(self, store: Store, prefix: str) -> None:
        first, second = await store.grant_lease(60), await store.grant_lease(60)
        assert first != second
        for name in ("freed", "moved"):
            await put(store, prefix + name, b"", first)
        await put(store, f"{prefix}freed", b"")
        await put(store, f"{prefix}moved", b"", second)
        await store.revoke_lease(first)
        items = (await store.list_prefix(prefix)).items
        assert [(kv.key, kv.lease_id) for kv in items] == [
            (f"{prefix}freed", 0),
            (f"{prefix}moved", second),
        ]
        await store.revoke_lease(second)

    async def test_a_lease_needs_time(self, store: Store) -> None:
        with pytest.raises(UsageError):
            await store.grant_lease(0)


class TestWatch:
    async def test_changes_come_in_order(self, store: Store, prefix: str) -> None:
        start = (await store.list_prefix(prefix)).revision
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            first = await put(store, f"{prefix}k", b"1")
            second = await put(store, f"{prefix}k", b"2")
            third = (await store.commit([], [Delete(f"{prefix}k")])).revision
            changes = await collect(watch, 3)
        assert changes == [
            Change(f"{prefix}k", b"1", first),
            Change(f"{prefix}k", b"2", second),
            Change(f"{prefix}k", None, third),
        ]

    async def test_only_what_is_newer_and_under_the_prefix(self, store: Store, prefix: str) -> None:
        await put(store, f"{prefix}d/old", b"")
        start = await put(store, f"{prefix}d/last", b"")
        for name in ("d", "d0", "c", "e"):
            await put(store, prefix + name, b"")
        new = await put(store, f"{prefix}d/new", b"")
        async with store.watch_prefix(f"{prefix}d/", after_revision=start) as watch:
            assert await collect(watch, 1) == [Change(f"{prefix}d/new", b"", new)]

    async def test_a_transaction_is_in_one_batch(self, store: Store, prefix: str) -> None:
        start = (await store.list_prefix(prefix)).revision
        writes = [Put(f"{prefix}{number:03}", b"") for number in range(100)]
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            revision = (await store.commit([], writes)).revision
            with trio.fail_after(_DEADLINE_S):
                batch = await anext(watch)
        assert len(batch.changes) == 100
        assert batch.revision == revision

    async def test_resuming_leaves_no_gap_and_repeats_nothing(
        self, store: Store, prefix: str
    ) -> None:
        start = (await store.list_prefix(prefix)).revision
        written: list[int] = []
        seen: list[int] = []
        for _ in range(5):
            async with store.watch_prefix(prefix, after_revision=start) as watch:
                for _ in range(3):
                    written.append(await put(store, f"{prefix}k", b""))
                with trio.fail_after(_DEADLINE_S):
                    batch = await anext(watch)
            seen += [change.revision for change in batch.changes]
            start = batch.revision
            written.append(await put(store, f"{prefix}k", b"unwatched"))
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            seen += [c.revision for c in await collect(watch, len(written) - len(seen))]
        assert seen == written

    async def test_a_slow_reader_misses_nothing(self, store: Store, prefix: str) -> None:
        start = (await store.list_prefix(prefix)).revision
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            written = [await put(store, f"{prefix}k", b"") for _ in range(300)]
            changes = await collect(watch, 300)
        assert [change.revision for change in changes] == written

    async def test_watches_do_not_disturb_each_other(self, store: Store, prefix: str) -> None:
        start = (await store.list_prefix(prefix)).revision
        async with (
            store.watch_prefix(prefix, after_revision=start) as outer,
            store.watch_prefix(f"{prefix}d/", after_revision=start) as inner,
        ):
            async with store.watch_prefix(prefix, after_revision=start):
                pass
            await put(store, f"{prefix}k", b"")
            await put(store, f"{prefix}d/k", b"")
            assert len(await collect(outer, 2)) == 2
            assert len(await collect(inner, 1)) == 1

    async def test_cancelled_waiting_loses_nothing(self, store: Store, prefix: str) -> None:
        start = (await store.list_prefix(prefix)).revision
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            for _ in range(20):
                with trio.move_on_after(0.002):
                    batch = await anext(watch)
                    assert not batch.changes
            revision = await put(store, f"{prefix}k", b"v")
            assert await collect(watch, 1) == [Change(f"{prefix}k", b"v", revision)]

    async def test_a_quiet_watch_shows_signs_of_life(self, store: Store, prefix: str) -> None:
        start = (await store.list_prefix(prefix)).revision
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            with trio.fail_after(_DEADLINE_S):
                batch = await anext(watch)
            assert batch.changes == ()
            assert batch.revision >= start
            revision = await put(store, f"{prefix}k", b"")
            assert await collect(watch, 1) == [Change(f"{prefix}k", b"", revision)]

    async def test_a_revision_to_come(self, store: Store, prefix: str) -> None:
        start = (await store.list_prefix(prefix)).revision
        async with store.watch_prefix(prefix, after_revision=start + 2) as watch:
            written = [await put(store, f"{prefix}k", b"") for _ in range(4)]
            assert [c.revision for c in await collect(watch, 2)] == written[2:]


class TestCompaction:
    async def test_a_compacted_revision_cannot_be_watched(
        self, under_test: StoreUnderTest, prefix: str
    ) -> None:
        store = under_test.store
        start = await put(store, f"{prefix}k", b"1")
        await put(store, f"{prefix}k", b"2")
        last = await put(store, f"{prefix}k", b"3")
        await under_test.compact(last)
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            with pytest.raises(CompactedError), trio.fail_after(_DEADLINE_S):
                await anext(watch)
            with pytest.raises(CompactedError):
                await anext(watch)
        listing = await store.list_prefix(prefix)
        async with store.watch_prefix(prefix, after_revision=listing.revision) as watch:
            revision = await put(store, f"{prefix}k", b"4")
            assert await collect(watch, 1) == [Change(f"{prefix}k", b"4", revision)]

    async def test_a_key_is_read_as_it_was_at_a_revision(
        self, under_test: StoreUnderTest, prefix: str
    ) -> None:
        store, key = under_test.store, f"{prefix}k"
        first = await put(store, key, b"1")
        second = await put(store, key, b"2")
        gone = (await store.commit([], [Delete(key)])).revision
        await put(store, key, b"3")

        async def value(revision: int) -> list[tuple[bytes, int]]:
            found = await store.read(key, revision=revision)
            return [(kv.value, kv.mod_revision) for kv in found.items]

        expected = {first: [(b"1", first)], second: [(b"2", second)], gone: []}
        assert {revision: await value(revision) for revision in expected} == expected
        await under_test.compact(second)
        assert await value(second) == expected[second]
        assert await value(gone) == []
        with pytest.raises(CompactedError):
            await value(first)

    async def test_a_deletion_at_the_compacted_revision_is_not_missed(
        self, under_test: StoreUnderTest, prefix: str
    ) -> None:
        store = under_test.store
        start = await put(store, f"{prefix}k", b"")
        deleted = (await store.commit([], [Delete(f"{prefix}k")])).revision
        await under_test.compact(deleted)
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            with pytest.raises(CompactedError), trio.fail_after(_DEADLINE_S):
                await anext(watch)

    async def test_from_the_compacted_revision_on(
        self, under_test: StoreUnderTest, prefix: str
    ) -> None:
        store = under_test.store
        compacted = await put(store, f"{prefix}k", b"1")
        await put(store, f"{prefix}k", b"2")
        await under_test.compact(compacted)
        async with store.watch_prefix(prefix, after_revision=compacted) as watch:
            assert await collect(watch, 1) == [Change(f"{prefix}k", b"2", compacted + 1)]

    async def test_an_open_watch_goes_on(self, under_test: StoreUnderTest, prefix: str) -> None:
        store = under_test.store
        start = await put(store, f"{prefix}k", b"1")
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            await put(store, f"{prefix}k", b"2")
            await collect(watch, 1)
            last = await put(store, f"{prefix}k", b"3")
            await under_test.compact(last)
            revision = await put(store, f"{prefix}k", b"4")
            assert [c.revision for c in await collect(watch, 2)] == [last, revision]


class TestReconnecting:
    async def test_watches_break_and_all_goes_on(self, store: Store, prefix: str) -> None:
        start = await put(store, f"{prefix}k", b"before")
        lease_id = await store.grant_lease(60)
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            store.reconnect()
            with pytest.raises(StoreUnavailableError, match=r"broke: .*[Cc]losed"):
                await collect(watch, 1)
        assert await store.keep_alive(lease_id) == 60
        revision = await put(store, f"{prefix}k", b"after")
        async with store.watch_prefix(prefix, after_revision=start) as watch:
            assert await collect(watch, 1) == [Change(f"{prefix}k", b"after", revision)]
        await store.revoke_lease(lease_id)


class TestCancellation:
    @pytest.mark.parametrize("call", ["list", "commit", "grant", "keep", "revoke", "watch", "next"])
    async def test_a_cancelled_call_ends_and_the_store_goes_on(
        self, store: Store, prefix: str, call: str
    ) -> None:
        revision = await put(store, f"{prefix}k", b"")
        lease_id = await store.grant_lease(60)

        async def enter_watch() -> None:
            async with store.watch_prefix(prefix, after_revision=revision):
                pytest.fail("the watch was entered")

        async def follow() -> None:
            with trio.CancelScope(shield=True) as shield:
                async with store.watch_prefix(prefix, after_revision=revision) as watch:
                    shield.shield = False
                    await anext(watch)

        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "list": partial(store.list_prefix, prefix),
            "commit": partial(store.commit, [], [Put(f"{prefix}new", b"")]),
            "grant": partial(store.grant_lease, 60),
            "keep": partial(store.keep_alive, lease_id),
            "revoke": partial(store.revoke_lease, lease_id),
            "watch": enter_watch,
            "next": follow,
        }
        with trio.CancelScope() as scope:
            scope.cancel()
            await calls[call]()
        assert scope.cancelled_caught
        await put(store, f"{prefix}k", b"after")
        async with store.watch_prefix(f"{prefix}k", after_revision=revision) as watch:
            assert [change.value for change in await collect(watch, 1)] == [b"after"]

    async def test_closing_twice(self, store: Store) -> None:
        await store.aclose()
        await store.aclose()
