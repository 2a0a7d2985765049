"""The store: what meshnet asks of the database that all agents share.

The `Store` protocol is a small, honest subset of etcd's v3 API: list a prefix at one revision,
watch it from a revision, commit a transaction, hold a lease.  `meshnet.store.etcd` is the real
one; `meshnet.store.memory` is a verified fake that passes the same contract tests
(``tests/contract/test_store.py``).  What the keys and values *mean* is not known here: see
`meshnet.store.registry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NewType, Protocol

import msgspec

from meshnet.errors import StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager

LeaseId = NewType("LeaseId", int)
"""An etcd lease id; never 0 (etcd's "no lease")."""


class CompactedError(StoreUnavailableError):
    """The revision to watch from is compacted away: list again, then watch from the new one."""


class LeaseExpiredError(StoreUnavailableError):
    """The lease is unknown to the store: it ran out or was revoked.  Grant a new one."""


class KeyValue(msgspec.Struct, frozen=True, gc=False):
    """One key as the store holds it.  `mod_revision` is that of its last write.

    Not a dataclass: the garbage collector need not walk over tens of thousands of these.
    """

    key: str
    value: bytes
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """Every key of a prefix as of one revision, ordered by key.

    `cluster_id` names the etcd cluster: another value means another database.
    """

    items: tuple[KeyValue, ...]
    revision: int
    cluster_id: int = 0


class Change(msgspec.Struct, frozen=True, gc=False):
    """One change of one key; `value` is None when the key was deleted (or its lease ran out)."""

    key: str
    value: bytes | None
    revision: int


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """Changes in revision order; all changes up to and including `revision` have been seen.

    An empty batch is a sign of life (etcd's progress notification).
    """

    changes: tuple[Change, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Absent:
    """Condition: `key` does not exist."""

    key: str


@dataclass(frozen=True, slots=True)
class Holds:
    """Condition: `key` exists and its value is exactly `value`."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Condition: the last write of `key` was at `mod_revision` (0: the key does not exist)."""

    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True)
class PrefixEmpty:
    """Condition: no key starts with `prefix`."""

    prefix: str


Condition = Absent | Holds | Unchanged | PrefixEmpty


@dataclass(frozen=True, slots=True)
class Put:
    """Write: set `key`; with a lease, the key goes when the lease does."""

    key: str
    value: bytes
    lease_id: LeaseId | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Write: remove `key`; removing an absent key does nothing."""

    key: str


@dataclass(frozen=True, slots=True)
class DeletePrefix:
    """Write: remove every key that starts with `prefix`."""

    prefix: str


Write = Put | Delete | DeletePrefix


@dataclass(frozen=True, slots=True)
class Commit:
    """Outcome of a transaction: whether its conditions held (and so its writes were made)."""

    succeeded: bool
    revision: int


class Store(Protocol):
    """A revisioned key-value store with leases.  All methods may be called from any trio task.

    Every method raises `StoreUnavailableError` when the store does not answer within the
    implementation's time-out, and `PolicyRefusedError` when credentials do not allow the call.
    Cancelling a call leaves it unknown whether a write was made; nothing else is affected.
    """

    async def list_prefix(self, prefix: str) -> Listing:
        """Read every key that starts with `prefix`, as of one revision (linearizable)."""
        ...

    async def read(self, key: str, *, revision: int = 0) -> Listing:
        """Read one key: a listing of it, or of nothing (linearizable).

        Args:
            revision: as of then; 0: now.

        Raises:
            CompactedError: that revision is compacted away.
        """
        ...

    def watch_prefix(
        self, prefix: str, *, after_revision: int
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchBatch]]:
        """Follow every change under `prefix` that is newer than `after_revision`.

        The iterator yields batches without end; it never skips a change.  It raises
        `CompactedError` when `after_revision` + 1 is compacted away and `StoreUnavailableError`
        when the stream breaks; resume with the last batch's revision.  Leaving the context
        ends the stream.
        """
        ...

    async def commit(self, when: Sequence[Condition], then: Sequence[Write]) -> Commit:
        """Make all writes of `then` in one revision if every condition of `when` holds."""
        ...

    async def grant_lease(self, ttl_s: int) -> LeaseId:
        """Make a lease that runs out `ttl_s` seconds after its last keep-alive."""
        ...

    async def keep_alive(self, lease_id: LeaseId) -> int:
        """Renew a lease; returns the granted time to live in seconds.

        Raises:
            LeaseExpiredError: the store does not know the lease.
        """
        ...

    async def revoke_lease(self, lease_id: LeaseId) -> None:
        """End a lease now, deleting its keys.  An unknown lease is not an error."""
        ...

    def reconnect(self) -> None:
        """Replace all connections, because this machine's address has changed: no answer would
        arrive at the old one.  Calls and watches that are under way fail, as if the store broke.
        """
        ...

    async def aclose(self) -> None:
        """Close connections and end helper threads.  Idempotent."""
        ...
