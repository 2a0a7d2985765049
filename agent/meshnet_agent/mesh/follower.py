"""Keeps the mirror of the store current: list once, then watch; list again after a compaction.

While the store is silent the mirror stays as it is, and so does the data path.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import structlog
import trio

from meshnet.errors import PolicyRefusedError, StoreUnavailableError
from meshnet.store import CompactedError, WatchBatch
from meshnet.store.mirror import MESH, Mirror

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.model import HostId, MeshSnapshot
    from meshnet.store import Store
    from meshnet.store.mirror import Changes
    from meshnet_agent.mesh.identity import MeshIdentity
    from meshnet_agent.tasks.right_of_way import RightOfWay

_log = structlog.get_logger()
_FIRST_DELAY_S = 0.1
_LAST_DELAY_S = 10.0
_RETURNS_A_SECOND, _LISTINGS_A_SECOND = 1000, 200
"""What all agents together may ask of etcd when it is back, or when all must list again
(docs/design/etcd-load.md)."""
_SLICE_KEYS = 100
"""Keys that are decoded without letting others run: 1 ms."""


class Follower:
    """Owns the mirror.

    Attributes:
        connected: whether the watch runs.
        error: why not.
        snapshot: what the store says; good until the next change (`Mirror.view`).

    Args:
        way: given way to between slices of many changes.
        on_change: called after every change with the snapshot and what the change comes to; None:
            everything was read anew.
        on_return: called when the store is followed again: meanwhile it may have been another one.
    """

    def __init__(
        self,
        store: Store,
        identity: MeshIdentity,
        on_change: Callable[[MeshSnapshot, Changes | None], None],
        on_return: Callable[[], None],
        way: RightOfWay,
    ) -> None:
        self._way = way
        self._store = store
        self._identity = identity
        self._mirror = Mirror()
        self._on_change = on_change
        self._on_return = on_return
        self._heard_at = trio.current_time()
        self._dead_since: dict[HostId, float] = {}
        self.connected = False
        self.error: str | None = None
        self.snapshot = self._mirror.view()

    @property
    def lag_s(self) -> float:
        """Seconds since the store was last heard of; small while connected."""
        return trio.current_time() - self._heard_at

    def dead_for_s(self) -> dict[HostId, float]:
        """Hosts without a lease, and for how long this agent has seen them so.

        Empty while the store is not heard: nothing is known then of who is dead.
        """
        if not self.connected:
            return {}
        now = trio.current_time()
        return {host: now - since for host, since in self._dead_since.items()}

    async def check_store(self) -> None:
        """Look whether the store is the one that is followed; before anything is written to it.

        Raises:
            PolicyRefusedError: it is not this host's mesh, or an older copy of it.
            StoreUnavailableError: that cannot be told now.
        """
        await self._identity.check()
        if self.connected:
            return  # its history was looked at when the watch began
        try:
            await self._identity.check_history(self._mirror)
        except CompactedError as error:
            raise StoreUnavailableError(
                "etcd's history was compacted and is being listed again: try again in a moment"
            ) from error

    async def list_all(self) -> None:
        """Read everything.

        Raises:
            StoreUnavailableError: the store does not answer.
            PolicyRefusedError: it is not this host's mesh (`MeshIdentity`).
        """
        await self._identity.check()
        started = time.perf_counter()
        listing = await self._store.list_prefix(MESH)
        listed = time.perf_counter()
        mirror = Mirror(before=self._mirror)
        for first in range(0, len(listing.items), _SLICE_KEYS):
            mirror.take(listing.items[first : first + _SLICE_KEYS])
            await self._way.give()
        mirror.finish(listing.revision)
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
        delay_s = _FIRST_DELAY_S
        just_listed = True
        while True:
            try:
                await self._watch_once(just_listed=just_listed)
            except CompactedError:
                _log.warning("history compacted, listing again", revision=self._mirror.revision)
                # Nothing is known of who is dead until then.
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
                delay_s = _FIRST_DELAY_S
            self.connected = False
            self.error = reason
            # Spread out, or all agents would come back in the same instant.
            spread_s = len(self.snapshot.hosts) / _RETURNS_A_SECOND
            await trio.sleep(random.uniform(0, max(delay_s, spread_s)))
            delay_s = min(_LAST_DELAY_S, delay_s * 2)

    async def _watch_once(self, *, just_listed: bool) -> None:
        after = self._mirror.revision
        # A watch of an empty store, or of one that went back in time, would only be silent.
        await self._identity.check()
        if not just_listed:
            # What was listed may be older than the history that the store still has.
            await self._identity.check_history(self._mirror)
        async with self._store.watch_prefix(MESH, after_revision=after) as batches:
            if not self.connected:
                _log.info("store followed", revision=after)
                # What was dead when the store was lost may have come back meanwhile: grace periods
                # begin again, or they would end on old news.
                self._dead_since = dict.fromkeys(self._dead_since, trio.current_time())
            was_lost = self.error is not None  # at the start it is not
            self.connected = True
            self.error = None
            if was_lost:
                self._on_return()
            self._heard_at = trio.current_time()
            async for batch in batches:
                self._heard_at = trio.current_time()
                await self._take(batch)
                self._identity.observe(batch.revision)

    async def _take(self, batch: WatchBatch) -> None:
        """Take changes in, thousands of them in slices; the last one brings the revision."""
        changes = batch.changes
        while len(changes) > _SLICE_KEYS:
            part, changes = changes[:_SLICE_KEYS], changes[_SLICE_KEYS:]
            self._changed(self._mirror.apply(WatchBatch(part, self._mirror.revision)))
            await self._way.give()
        found = self._mirror.apply(WatchBatch(changes, batch.revision))
        if changes:
            self._changed(found)

    def _changed(self, changes: Changes | None) -> None:
        now = self._heard_at = trio.current_time()
        snapshot = self.snapshot = self._mirror.view()
        if changes is None:
            dead = snapshot.hosts.keys() - snapshot.alive.keys()
            self._dead_since = {host: self._dead_since.get(host, now) for host in dead}
        else:
            for host in changes.leases:
                if host in snapshot.hosts and host not in snapshot.alive:
                    self._dead_since.setdefault(host, now)
                else:
                    self._dead_since.pop(host, None)
        self._on_change(snapshot, changes)
