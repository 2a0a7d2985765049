"""The store in memory: a verified fake of etcd, for tests and simulations.

Job: behave as `meshnet.store.etcd.EtcdStore` does (revisions, leases, compaction, watches, errors)
without a process or a network, so that many agents in one trio run can share it.  It passes the
same contract tests (``tests/contract/test_store.py``).  Place: tests only; never in production.
May import of meshnet only `meshnet.store` and `meshnet.errors`.

Time is a clock that the caller passes; with `trio.testing.MockClock` hours pass at once.  No task
ends leases: every call first ends those that have run out, and a waiting watch wakes when the next
one is due, so that it sees the keys go.
"""

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from meshnet.errors import StoreUnavailableError, UsageError
from meshnet.store import (
    Absent,
    Change,
    Commit,
    CompactedError,
    Delete,
    Holds,
    KeyValue,
    LeaseExpiredError,
    LeaseId,
    Listing,
    Put,
    Unchanged,
    WatchBatch,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from typing import Self

    from meshnet.store import Condition, Write

PROGRESS_INTERVAL_S = 2.5
"""How long a watch is quiet before it yields an empty batch, as `EtcdStore`'s does."""

_MAX_OPERATIONS = 128  # etcd's --max-txn-ops


@dataclass(slots=True)
class _Lease:
    ttl_s: int
    expires_at: float


@dataclass(slots=True)
class _Database:
    """What all clients share.  Everything here runs between two checkpoints, so it is atomic."""

    clock: Callable[[], float]
    cluster_id: int
    revision: int = 1
    compacted: int = 0
    keys: dict[str, KeyValue] = field(default_factory=dict)
    leases: dict[LeaseId, _Lease] = field(default_factory=dict)
    history: list[Change] = field(default_factory=list)
    before: dict[str, Change] = field(default_factory=dict)
    watches: set[_Watch] = field(default_factory=set)
    last_lease: int = 0x1000

    def end_leases(self) -> None:
        """Delete the keys of every lease that has run out, each lease in one revision."""
        now = self.clock()
        due = [(lease.expires_at, id_) for id_, lease in self.leases.items()]
        for expires_at, lease_id in sorted(due):
            if expires_at <= now:
                self.end_lease(lease_id)

    def end_lease(self, lease_id: LeaseId) -> None:
        del self.leases[lease_id]
        self.write(
            [Delete(key) for key, kv in sorted(self.keys.items()) if kv.lease_id == lease_id]
        )

    def until_next_end_s(self) -> float:
        """Seconds until the next lease runs out; infinite without leases."""
        ends = [lease.expires_at for lease in self.leases.values()]
        return max(0.0, min(ends) - self.clock()) if ends else float("inf")

    def holds(self, condition: Condition) -> bool:
        match condition:
            case Absent(key):
                return key not in self.keys
            case Holds(key, value):
                return key in self.keys and self.keys[key].value == value
            case Unchanged(key, mod_revision):
                return (self.keys[key].mod_revision if key in self.keys else 0) == mod_revision
            case _:
                return not any(key.startswith(condition.prefix) for key in self.keys)

    def write(self, then: Iterable[Write]) -> None:
        """Make all writes in one revision; the revision is used up only if something changes."""
        revision = self.revision + 1
        changes: list[Change] = []
        for write in then:
            if isinstance(write, Put):
                lease_id = write.lease_id or 0
                self.keys[write.key] = KeyValue(write.key, write.value, revision, lease_id)
                changes.append(Change(write.key, write.value, revision))
                continue
            gone = [write.key] if isinstance(write, Delete) else self.keys_under(write.prefix)
            for key in gone:
                if self.keys.pop(key, None) is not None:
                    changes.append(Change(key, None, revision))
        if changes:
            self.revision = revision
            self.history += changes
            for watch in self.watches:
                watch.feed(changes)

    def as_of(self, key: str, revision: int) -> tuple[KeyValue, ...]:
        """A key as it was at a revision that is not compacted; nothing if there was none."""
        last = self.before.get(key)
        for change in self.history:
            if change.key == key and change.revision <= revision:
                last = change
        if last is None or last.value is None:
            return ()
        return (KeyValue(key, last.value, last.revision),)

    def keys_under(self, prefix: str) -> list[str]:
        return sorted(key for key in self.keys if key.startswith(prefix))


class MemoryStore:
    """A `Store` in memory, and one client of it.

    All agents of a test may share one `MemoryStore`; or each has its own from `connect`, so that
    `set_available` cuts off just one.

    Args:
        clock: seconds, never going back.
        cluster_id: what `Listing.cluster_id` says.
    """

    def __init__(
        self, *, clock: Callable[[], float] = trio.current_time, cluster_id: int = 1
    ) -> None:
        self._database = _Database(clock, cluster_id)
        self._available = True
        self._watches: set[_Watch] = set()

    def connect(self) -> MemoryStore:
        """Another client of the same database, with a `set_available` of its own."""
        client = MemoryStore()
        client._database = self._database
        return client

    def set_available(self, available: bool) -> None:
        """Fault injection: while False, this client's calls fail; its open watches break for good.

        The database goes on without this client: its leases run out.
        """
        self._available = available
        if not available:
            for watch in self._watches:
                watch.break_off(self._unavailable("watch"))

    def compact(self, revision: int) -> None:
        """Forget the history up to and including `revision`.

        Raises:
            UsageError: the revision is in the future or compacted already, as etcd says.
        """
        self._database.end_leases()
        if not self._database.compacted < revision <= self._database.revision:
            raise UsageError(
                f"cannot compact revision {revision}: it is not between the compacted "
                f"{self._database.compacted} and the current {self._database.revision}"
            )
        database = self._database
        database.compacted = revision
        # What each key was at that revision can still be read, though not watched.
        database.before |= {c.key: c for c in database.history if c.revision <= revision}
        database.history = [c for c in database.history if c.revision > revision]

    async def list_prefix(self, prefix: str) -> Listing:
        """Read a prefix.  Checkpoints before reading."""
        database = await self._enter("list")
        items = tuple(database.keys[key] for key in database.keys_under(prefix))
        return Listing(items, database.revision, database.cluster_id)

    async def read(self, key: str, *, revision: int = 0) -> Listing:
        """Read one key, now or as of a revision.  Checkpoints before reading."""
        database = await self._enter("read")
        items: tuple[KeyValue, ...] = (database.keys[key],) if key in database.keys else ()
        if revision:
            if revision < database.compacted:
                raise CompactedError(
                    f"cannot read {key}: revision {revision} is compacted: list again"
                )
            items = database.as_of(key, revision)
        return Listing(items, database.revision, database.cluster_id)

    @asynccontextmanager
    async def watch_prefix(
        self, prefix: str, *, after_revision: int
    ) -> AsyncIterator[AsyncIterator[WatchBatch]]:
        """Follow a prefix.  What waits to be read is not bounded."""
        database = await self._enter("watch")
        watch = _Watch(database, prefix, after_revision)
        if after_revision < database.compacted:
            watch.break_off(
                CompactedError(
                    f"cannot watch {prefix} after revision {after_revision}: the store has "
                    f"compacted up to {database.compacted}: list again"
                )
            )
        watch.feed(database.history)
        database.watches.add(watch)
        self._watches.add(watch)
        try:
            yield watch
        finally:
            database.watches.discard(watch)
            self._watches.discard(watch)

    async def commit(self, when: Sequence[Condition], then: Sequence[Write]) -> Commit:
        """Run a transaction.  Checkpoints before it; cancelled there, nothing is written.

        Raises:
            LeaseExpiredError: a put names an unknown lease; nothing is written.
            UsageError: a key is empty or is written twice, or there are more than 128 writes.
        """
        database = await self._enter("write")
        _check_operations(when, then)
        if not all(database.holds(condition) for condition in when):
            return Commit(False, database.revision)
        for write in then:
            if isinstance(write, Put) and write.lease_id is not None:
                self._lease(write.lease_id)
        database.write(then)
        return Commit(True, database.revision)

    async def grant_lease(self, ttl_s: int) -> LeaseId:
        """Make a lease."""
        database = await self._enter("grant a lease")
        if ttl_s <= 0:
            raise UsageError(f"cannot grant a lease of {ttl_s} s: give at least one second")
        database.last_lease += 1
        lease_id = LeaseId(database.last_lease)
        database.leases[lease_id] = _Lease(ttl_s, database.clock() + ttl_s)
        for watch in database.watches:
            watch.wake()  # this lease may run out before the one that it sleeps for
        return lease_id

    async def keep_alive(self, lease_id: LeaseId) -> int:
        """Renew a lease."""
        database = await self._enter("renew a lease")
        lease = self._lease(lease_id)
        lease.expires_at = database.clock() + lease.ttl_s
        return lease.ttl_s

    async def revoke_lease(self, lease_id: LeaseId) -> None:
        """End a lease and delete its keys."""
        database = await self._enter("revoke a lease")
        if lease_id in database.leases:
            database.end_lease(lease_id)

    def reconnect(self) -> None:
        """Break this client's open watches for good; calls have no connection."""
        for watch in self._watches:
            watch.break_off(StoreUnavailableError("the watch broke: the connection was closed"))

    async def aclose(self) -> None:
        """Do nothing: others may share this client."""
        await trio.lowlevel.checkpoint()

    async def _enter(self, about: str) -> _Database:
        await trio.lowlevel.checkpoint()
        if not self._available:
            raise self._unavailable(about)
        self._database.end_leases()
        return self._database

    def _lease(self, lease_id: LeaseId) -> _Lease:
        try:
            return self._database.leases[lease_id]
        except KeyError:
            raise LeaseExpiredError(
                f"the store does not know lease {lease_id:x}: grant a new one"
            ) from None

    def _unavailable(self, about: str) -> StoreUnavailableError:
        return StoreUnavailableError(f"cannot {about}: the store in memory was made unavailable")


class _Watch:
    """The iterator of one watch: changes are fed to it as they are made."""

    def __init__(self, database: _Database, prefix: str, after_revision: int) -> None:
        self._database = database
        self._prefix = prefix
        self._revision = after_revision
        self._waiting: deque[Change] = deque()
        self._end: StoreUnavailableError | None = None
        self._news = trio.Event()

    def feed(self, changes: Iterable[Change]) -> None:
        for change in changes:
            if change.revision > self._revision and change.key.startswith(self._prefix):
                self._waiting.append(change)
                self.wake()

    def break_off(self, end: StoreUnavailableError) -> None:
        if self._end is None:
            self._end = end
            self.wake()

    def wake(self) -> None:
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchBatch:
        await trio.lowlevel.checkpoint()
        alive_at = trio.current_time() + PROGRESS_INTERVAL_S
        while True:
            self._database.end_leases()
            if self._end is not None:
                raise self._end
            if self._waiting:
                changes = tuple(self._waiting)
                self._waiting.clear()
                self._revision = changes[-1].revision
                return WatchBatch(changes, self._revision)
            if trio.current_time() >= alive_at:
                return WatchBatch((), self._revision)
            self._news = trio.Event()
            with trio.move_on_at(alive_at), trio.move_on_after(self._database.until_next_end_s()):
                await self._news.wait()


def _check_operations(when: Sequence[Condition], then: Sequence[Write]) -> None:
    """Refuse what etcd refuses (checkTxnRequest in etcd's api/v3rpc/key.go)."""
    if max(len(when), len(then)) > _MAX_OPERATIONS:
        raise UsageError(f"cannot write: more than {_MAX_OPERATIONS} operations in a transaction")
    if not all(getattr(operation, "key", "not one key") for operation in (*when, *then)):
        raise UsageError("cannot write: a key is empty")
    puts = [write.key for write in then if isinstance(write, Put)]
    if len(puts) != len(set(puts)):
        raise UsageError("cannot write: a key is written twice in one transaction")
    for write in then:
        if isinstance(write, Put):
            continue
        for key in puts:
            if key == write.key if isinstance(write, Delete) else key.startswith(write.prefix):
                raise UsageError(f"cannot write {key}: the same transaction deletes it")
