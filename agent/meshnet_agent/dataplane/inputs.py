"""The inputs of passes and probes: values, gathered from the parts that know them.

No other module of the data plane asks the mesh or the endpoints for anything.
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
    from meshnet_agent.mesh.store_addresses import StoreAddresses


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalParts:
    """The parts that together know everything about this host that a plan depends on."""

    membership: Membership
    endpoints: OwnEndpoints
    pool: PoolAddresses
    takeovers: Takeovers
    fallback: Fallback
    store: StoreAddresses

    def view(self, expired: frozenset[HostId]) -> LocalView:
        """What this agent knows about its own host now, as a value."""
        return LocalView(
            host=self.membership.host.id,
            subnets=dict(self.membership.subnets),
            endpoints=list(self.endpoints.all),
            addresses=dict(self.pool.host_addresses),
            takeovers=dict(self.takeovers.states),
            expired=expired,
            fallen=self.fallback.fallen,
            store_addresses=self.store.all,
        )


class Target(NamedTuple):
    """A peer to probe: the TUN whose process sends, the peer's address, the MTU of the network."""

    tun: str
    underlay_ip: str
    mtu_bytes: int


class PassInputs(MeshListener):
    """Gathers the inputs of passes, and marks as dirty what changes of the mesh affect.

    Args:
        underlay_dev: the link that has this host's underlay address, if the address may change.
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
        # The expired hosts of the last input: a lease matters to the kernel only if one of them
        # comes back.
        self._expired: frozenset[HostId] = frozenset()

    def mesh_changed(self, snapshot: MeshSnapshot, changes: Changes | None) -> None:
        """See `MeshListener`."""
        if changes is None or changes.networks or snapshot.holes:
            self._dirty.mark_all()
        else:
            # A lease alone changes nothing in the kernel, except for a host whose grace period has
            # ended.
            self._dirty.touch(changes.hosts | (changes.leases & self._expired))

    def next_expiry_s(self) -> float:
        """Seconds until the next dead host expires, which changes `gather_part`'s result."""
        return self._liveness.next_expiry_s()

    def gather(self) -> PassInput:
        """The input of a pass over everything."""
        self._expired = self._liveness.expired()
        return PassInput(
            snapshot=self._mesh.copy_snapshot(),
            local=self._local.view(self._expired),
            underlay_ip=self._local.membership.host.underlay_ip,
            underlay_dev=self._underlay_dev,
        )

    def gather_part(self, hosts: Collection[HostId]) -> PartInput | None:
        """The input of a pass over some hosts.

        None: nothing changed, or a pass over everything is needed, which it has asked for.
        """
        expired, before = self._liveness.expired(), self._expired
        self._expired = expired
        if not hosts and expired == before:
            return None
        snapshot = self._mesh.snapshot
        if snapshot.holes:
            # Only a pass over everything knows what may be deleted while a value is unreadable.
            self._dirty.mark_all()
            return None
        return PartInput(
            hosts={h: HostView(snapshot.hosts.get(h), snapshot.reserved_by(h)) for h in hosts},
            expired=expired,
            fallen=self._local.fallback.fallen,
        )

    def probe_targets(self, result: PassResult) -> dict[Pair, Target] | None:
        """The peers to probe after a pass with this result; None: that is not known now."""
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
                return None  # a new network: ask again after the next pass, which plans it
            tun = backend_of(network).userspace_vtep(network)
            if outcome.plan is None or tun is None:
                continue
            mtu_bytes = outcome.plan.mtu_bytes
            found = probed_peers(network, snapshot, local, result.underlay, outcome)
            for host, peer in found.items():
                target = Target(tun, str(peer.host.underlay_ip), mtu_bytes)
                targets[network.name, host] = target
        return targets
