"""What passes and probes work on: values, gathered from the parts that know them.

Nothing else of the data plane asks the mesh or the endpoints for anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from meshnet.backends.table import backend_of
from meshnet.plan import LocalView, probed_peers
from meshnet_agent.dataplane.pass_values import HostView, PartInput, PassInput
from meshnet_agent.mesh.view import MeshListener

if TYPE_CHECKING:
    from collections.abc import Collection

    from meshnet.model import HostId, MeshSnapshot
    from meshnet.store.mirror import Changes
    from meshnet_agent.dataplane.dirty import Dirty
    from meshnet_agent.dataplane.fallback import Fallback, Pair
    from meshnet_agent.dataplane.pass_values import PassResult
    from meshnet_agent.dataplane.takeovers import Takeovers
    from meshnet_agent.endpoints.addresses.pool import PoolAddresses
    from meshnet_agent.endpoints.surroundings import OwnEndpoints
    from meshnet_agent.mesh.follower import Follower
    from meshnet_agent.mesh.liveness import Liveness
    from meshnet_agent.mesh.membership import Membership


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalParts:
    """The parts that together know all of this host that a plan depends on."""

    membership: Membership
    endpoints: OwnEndpoints
    pool: PoolAddresses
    takeovers: Takeovers
    fallback: Fallback

    def view(self, expired: frozenset[HostId]) -> LocalView:
        """What this agent knows of its own host, now."""
        return LocalView(
            host=self.membership.host.id,
            subnets=dict(self.membership.subnets),
            endpoints=list(self.endpoints.all),
            addresses=dict(self.pool.host_addresses),
            takeovers=dict(self.takeovers.states),
            expired=expired,
            fallen=self.fallback.fallen,
        )


class Target(NamedTuple):
    """A peer to probe: by which TUN's process, where, and how long a packet may be."""

    tun: str
    underlay_ip: str
    mtu_bytes: int


class PassInputs(MeshListener):
    """Gathers what passes work on, and marks what changes of the mesh make of it.

    Args:
        underlay_dev: the link whose address the underlay's is, if that may change.
    """

    def __init__(
        self,
        mesh: Follower,
        liveness: Liveness,
        local: LocalParts,
        dirty: Dirty,
        underlay_dev: str | None,
    ) -> None:
        self._mesh = mesh
        self._liveness = liveness
        self._local = local
        self._dirty = dirty
        self._underlay_dev = underlay_dev
        # Those that the last input named: who of them is back matters to the kernel.
        self._expired: frozenset[HostId] = frozenset()

    def mesh_changed(self, snapshot: MeshSnapshot, changes: Changes | None) -> None:
        """See `MeshListener`."""
        if changes is None or changes.networks or snapshot.holes:
            self._dirty.mark_all()
        else:
            # A lease alone changes nothing in the kernel, except for a host that was given up.
            self._dirty.touch(changes.hosts | (changes.leases & self._expired))

    def next_expiry_s(self) -> float:
        """Seconds until `gather_part` changes by the clock alone."""
        return self._liveness.next_expiry_s()

    def gather(self) -> PassInput:
        """For a pass over everything."""
        self._expired = self._liveness.expired()
        return PassInput(
            snapshot=self._mesh.copy_snapshot(),
            local=self._local.view(self._expired),
            underlay_ip=self._local.membership.host.underlay_ip,
            underlay_dev=self._underlay_dev,
        )

    def gather_part(self, hosts: Collection[HostId]) -> PartInput | None:
        """For a pass over some hosts; None: nothing changed, or it takes one over everything."""
        expired, before = self._liveness.expired(), self._expired
        self._expired = expired
        if not hosts and expired == before:
            return None
        snapshot = self._mesh.snapshot
        if snapshot.holes:
            self._dirty.mark_all()  # that one knows what may be deleted
            return None
        return PartInput(
            hosts={h: HostView(snapshot.hosts.get(h), snapshot.reserved_by(h)) for h in hosts},
            expired=expired,
            fallen=self._local.fallback.fallen,
        )

    def probe_targets(self, result: PassResult) -> dict[Pair, Target] | None:
        """Whom to probe, after a pass that came to `result`; None: not known now."""
        snapshot = self._mesh.snapshot
        if result.underlay is None or snapshot.holes:
            return None
        local = self._local.view(self._expired)
        targets: dict[Pair, Target] = {}
        for network in snapshot.networks.values():
            outcome = result.networks.get(network.name)
            if not network.fallback:
                continue
            if outcome is None:
                return None  # the next pass has it
            tun = backend_of(network).userspace_vtep(network)
            if outcome.plan is None or tun is None:
                continue
            mtu_bytes = outcome.plan.mtu_bytes
            for host, peer in probed_peers(network, snapshot, local, result.underlay).items():
                target = Target(tun, str(peer.host.underlay_ip), mtu_bytes)
                targets[network.name, host] = target
        return targets
