"""Which hosts are dead, for how long, and which of them have outlived their grace period.

A host whose lease ended keeps its routes for a grace period (design decision D5).  It counts from
when *this* agent saw the lease end, because the clocks of hosts differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from meshnet_agent.mesh.view import MeshListener

if TYPE_CHECKING:
    from meshnet.model import HostId, MeshSnapshot
    from meshnet.store.mirror import Changes
    from meshnet_agent.mesh.view import MeshView


class Liveness(MeshListener):
    """Hosts without a lease.

    Args:
        grace_s: how many seconds a dead host's routes stay.
    """

    def __init__(self, mesh: MeshView, grace_s: float) -> None:
        self._mesh = mesh
        self._grace_s = grace_s
        self._dead_since: dict[HostId, float] = {}

    def dead_for_s(self) -> dict[HostId, float]:
        """Hosts without a lease, and for how many seconds this agent has seen them without one.

        Empty while the store is not followed: nobody knows then which hosts are dead, and no route
        may go for that reason.
        """
        if not self._mesh.connected:
            return {}
        now = trio.current_time()
        return {host: now - since for host, since in self._dead_since.items()}

    def expired(self) -> frozenset[HostId]:
        """Hosts that have been dead for longer than the grace period."""
        return frozenset(h for h, s in self.dead_for_s().items() if s >= self._grace_s)

    def next_expiry_s(self) -> float:
        """Seconds until the next dead host's grace period ends; infinity if none is running."""
        left = (self._grace_s - dead_s for dead_s in self.dead_for_s().values())
        return min((seconds for seconds in left if seconds > 0), default=float("inf"))

    def mesh_changed(self, snapshot: MeshSnapshot, changes: Changes | None) -> None:
        """See `MeshListener`."""
        now = trio.current_time()
        if changes is None:
            dead = snapshot.hosts.keys() - snapshot.alive.keys()
            self._dead_since = {host: self._dead_since.get(host, now) for host in dead}
            return
        for host in changes.leases:
            if host in snapshot.hosts and host not in snapshot.alive:
                self._dead_since.setdefault(host, now)
            else:
                self._dead_since.pop(host, None)

    def store_returned(self) -> None:
        """See `MeshListener`.

        A host that was dead when the store was lost may have come back meanwhile.  So grace periods
        start again: they must not end because of what was known before the outage.
        """
        self._dead_since = dict.fromkeys(self._dead_since, trio.current_time())
