"""Keeps the mirror of the store current: list once, then watch; list again after a compaction.

While the store is silent the mirror stays as it is, and so does the data path.
"""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import PolicyRefusedError, StoreUnavailableError
from meshnet.store import CompactedError, WatchBatch
from meshnet.store.mirror import MESH, Mirror
from meshnet_agent.tasks.backoff import Backoff

if TYPE_CHECKING:
    from meshnet.model import MeshSnapshot
    from meshnet.store import Store
    from meshnet.store.mirror import Changes, MirrorState
    from meshnet.store.saved import SavedMesh
    from meshnet_agent.mesh.identity import MeshIdentity
    from meshnet_agent.mesh.view import MeshListener
    from meshnet_agent.tasks.right_of_way import RightOfWay

_log = structlog.get_logger()
_DELAYS_S = (0.1, 10.0)
_RETURNS_A_SECOND, _LISTINGS_A_SECOND = 1000, 200
"""How fast all agents together may come back to etcd after an outage, and list it again after a
compaction: a listing costs 150 times as much as resuming a watch (docs/design/etcd-load.md)."""
_SLICE_KEYS = 100
"""How many keys are decoded before other tasks may run: 1 ms of work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreReport:
    """Whether this agent hears from the store.

    Attributes:
        connected: whether the watch runs.
        lag_s: seconds since the store was last heard from.
        from_disk_s: age in seconds of what this host had on its disk, while it goes by that because
            the store has not answered since the agent started; else None.
        error: why the watch does not run; None while it does.
    """

    connected: bool
    lag_s: float
    from_disk_s: float | None
    error: str | None


class Follower:
    """Owns the mirror: `meshnet_agent.mesh.view.MeshView`.

    Attributes:
        connected: whether the watch runs.
        error: why it does not run; None while it does.
        snapshot: what the store says; valid until the next change (`Mirror.view`).

    Args:
        right_of_way: the follower gives way between slices of many changes.
    """

    def __init__(self, store: Store, identity: MeshIdentity, right_of_way: RightOfWay) -> None:
        self._right_of_way = right_of_way
        self._store = store
        self._identity = identity
        self._mirror = Mirror()
        self._listeners: list[MeshListener] = []
        self._heard_at = trio.current_time()
        self._saved_at_s = 0.0
        self.connected = False
        self.error: str | None = None
        self.snapshot = self._mirror.view()

    def tell(self, *listeners: MeshListener) -> None:
        """Tell parts of every change from now on, in this order."""
        self._listeners += listeners

    @property
    def lag_s(self) -> float:
        """Seconds since the store was last heard from; small while connected."""
        return trio.current_time() - self._heard_at

    def report(self) -> StoreReport:
        """Whether this agent hears from the store now."""
        from_disk_s = time.time() - self._saved_at_s if self._mirror.from_disk else None
        return StoreReport(
            connected=self.connected, lag_s=self.lag_s, from_disk_s=from_disk_s, error=self.error
        )

    @property
    def is_complete(self) -> bool:
        """Whether all of the mesh is known from the store: it was listed, without a hole."""
        return self.snapshot.revision > 0 and not self.snapshot.holes

    def copy_state(self) -> MirrorState:
        """All that is known of the mesh, as a value that later changes do not touch."""
        return self._mirror.state()

    def restore(self, saved: SavedMesh, reason: str) -> None:
        """Start from this host's disk, and tell the listeners: the store does not answer.

        From here on the agent is like one that has lost the store, but for this: nothing that is
        missing is deleted before the mesh was listed again.

        Args:
            reason: why the store does not answer.
        """
        self._mirror, self._saved_at_s = saved.mirror, saved.saved_at_s
        self.error = reason
        _log.warning(
            "started from disk, the store does not answer",
            reason=reason,
            hosts=len(saved.mirror.view().hosts),
            age_s=round(time.time() - saved.saved_at_s),
        )
        self._changed(None)

    async def check_store(self) -> None:
        """See `MeshView`."""
        await self._identity.check()
        if self.connected:
            return  # `_watch_once` checked its history when the watch began
        try:
            await self._identity.check_history(self._mirror)
        except CompactedError as error:
            raise StoreUnavailableError(
                "etcd's history was compacted, and this agent is listing the mesh again: try again "
                "in a moment"
            ) from error

    async def list_all(self) -> None:
        """List the mesh anew, and tell the listeners.

        Raises:
            StoreUnavailableError: the store does not answer.
            PolicyRefusedError: the store is not this host's mesh (`MeshIdentity`), or its history
                is not the one that this agent has seen.
        """
        await self._identity.check()
        started = time.perf_counter()
        listing = await self._store.list_prefix(MESH)
        listed = time.perf_counter()
        mirror = Mirror(before=self._mirror)
        for first in range(0, len(listing.items), _SLICE_KEYS):
            mirror.add_listed(listing.items[first : first + _SLICE_KEYS])
            await self._right_of_way.give()
        mirror.finish(listing.revision)
        # Where the history that this agent saw is compacted away, `check_history` cannot tell: an
        # etcd restored from an older copy, and written to and compacted since, was once followed.
        if mirror.contradiction is not None:
            raise self._identity.refusal_of(mirror.contradiction, self._mirror.revision)
        self._mirror = mirror
        _log.info(
            "mesh listed",
            keys=len(listing.items),
            revision=listing.revision,
            seconds=round(time.perf_counter() - started, 4),
            decode_s=round(time.perf_counter() - listed, 4),
        )
        self._changed(None)

    def copy_snapshot(self) -> MeshSnapshot:
        """What the store says, as a value that later changes do not touch."""
        return self._mirror.snapshot()

    async def watch(self) -> None:
        """Follow changes; `list_all` came first.  Never returns."""
        backoff = Backoff(*_DELAYS_S)
        just_listed = not self._mirror.from_disk
        while True:
            try:
                if self._mirror.from_disk:
                    await self._list_after_start_from_disk()
                    just_listed = True
                await self._watch_once(just_listed=just_listed)
            except CompactedError:
                _log.warning("history compacted, listing again", revision=self._mirror.revision)
                # Not connected any more: until the listing, nobody knows which hosts are dead.
                self.connected, self.error = False, "history compacted, listing again"
                await trio.sleep(random.uniform(0, len(self.snapshot.hosts) / _LISTINGS_A_SECOND))
                try:
                    await self.list_all()
                    just_listed = True
                    continue
                except (StoreUnavailableError, PolicyRefusedError) as error:
                    reason = str(error)
            except (StoreUnavailableError, PolicyRefusedError) as error:
                reason = str(error)
            just_listed = False
            if reason != self.error:
                _log.warning("store lost", reason=reason)
            if self.connected:
                backoff.reset()
            self.connected = False
            self.error = reason
            # With the back-off alone, 10,000 agents would come back within 0.8 s of a restart that
            # took 2 s, which is more than etcd can serve (docs/design/etcd-load.md).
            each_second = _LISTINGS_A_SECOND if self._mirror.from_disk else _RETURNS_A_SECOND
            spread_s = len(self.snapshot.hosts) / each_second
            await trio.sleep(random.uniform(0, max(backoff.failed(), spread_s)))

    async def _list_after_start_from_disk(self) -> None:
        """List the mesh, as at a start; but the history that this host has seen must be there."""
        await self._identity.check()
        with contextlib.suppress(CompactedError):  # then the listing tells, if anything does
            await self._identity.check_history(self._mirror)
        await self.list_all()

    async def _watch_once(self, *, just_listed: bool) -> None:
        after = self._mirror.revision
        # A watch on an etcd that is empty or was restored from an older copy raises no error: it
        # just stays silent.
        await self._identity.check()
        if not just_listed:
            # While this agent was away, etcd may have been restored and written to until its
            # revision was no longer behind.  Not right after a listing: where all history is
            # compacted, the check asks for a listing, and an agent once listed for ever.
            await self._identity.check_history(self._mirror)
        async with self._store.watch_prefix(MESH, after_revision=after) as batches:
            if not self.connected:
                _log.info("store followed", revision=after)
            was_lost = self.error is not None  # None when the agent starts
            self.connected = True
            self.error = None
            if was_lost:
                for listener in self._listeners:
                    listener.store_returned()
            self._heard_at = trio.current_time()
            async for batch in batches:
                self._heard_at = trio.current_time()
                await self._take(batch)
                self._identity.observe(batch.revision)

    async def _take(self, batch: WatchBatch) -> None:
        """Take in changes, many of them in slices; only the last slice moves the revision on.

        Before that the mirror lacks some of the batch, and a part that asks whether the snapshot
        shows a revision yet (`Membership`) must not be told that it does.
        """
        changes = batch.changes
        while len(changes) > _SLICE_KEYS:
            part, changes = changes[:_SLICE_KEYS], changes[_SLICE_KEYS:]
            self._changed(self._mirror.apply(WatchBatch(part, self._mirror.revision)))
            await self._right_of_way.give()
        found = self._mirror.apply(WatchBatch(changes, batch.revision))
        if changes:
            self._changed(found)

    def _changed(self, changes: Changes | None) -> None:
        self._heard_at = trio.current_time()
        self.snapshot = self._mirror.view()
        for listener in self._listeners:
            listener.mesh_changed(self.snapshot, changes)
