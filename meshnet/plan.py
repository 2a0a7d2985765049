"""Plans what this host's kernel should hold, from what the mesh has agreed on.

Pure: imports no socket, file, clock or trio.  A plan depends only on its arguments: a snapshot of
the store, what the agent knows about its own host, and what the kernel says about the underlay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meshnet.backends import NetworkInput, NetworkPlan, NexthopIds, Peer, Underlay
from meshnet.backends.conflicts import find_conflict
from meshnet.backends.occupied import (
    Underlays,
    hidden_by,
    kept_off,
    refusal,
    store_occupants,
    strangers,
)
from meshnet.backends.physical import missing_parent
from meshnet.backends.table import backend_of
from meshnet.backends.tunnel import route_key
from meshnet.firewall import firewall_for
from meshnet.model import Reservations
from meshnet.state import KernelState

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from meshnet.backends import Occupant
    from meshnet.firewall import FirewallNetwork
    from meshnet.model import (
        Endpoint,
        HostId,
        IpAddress,
        IpNetwork,
        MeshSnapshot,
        Network,
        NetworkName,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalView:
    """What this agent knows about its own host.

    Attributes:
        subnets: the subnets that it holds reservations for.
        addresses: its own addresses from underlay networks' pools, at most one for each IP version.
        takeovers: for networks that take over their parent, why that failed; "" if it is done; a
            network that is missing here is still being taken over.
        expired: hosts dead for longer than the grace period.
        fallen: peers that this host reaches by a network's fallback now.
        store_addresses: etcd's.
    """

    host: HostId
    subnets: Mapping[NetworkName, tuple[IpNetwork, ...]]
    endpoints: Sequence[Endpoint] = ()
    addresses: Mapping[NetworkName, tuple[IpAddress, ...]] = field(default_factory=dict)
    takeovers: Mapping[NetworkName, str] = field(default_factory=dict)
    expired: frozenset[HostId] = frozenset()
    fallen: frozenset[tuple[NetworkName, HostId]] = frozenset()
    store_addresses: frozenset[IpAddress] = frozenset()

    def fallen_in(self, network: NetworkName) -> frozenset[HostId]:
        """Peers that one network reaches by its fallback now."""
        return frozenset(host for name, host in self.fallen if name == network)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOutcome:
    """The result of planning one network.

    Attributes:
        plan: None: this host does not take part in it (yet).
        refused: whether it will not work on this host until somebody changes something.
        peers: how many other hosts have a subnet of it.
        path_mtu_bytes: MTU of the narrowest path to a peer, which decides its endpoints' MTU; 0:
            the network itself has a fixed MTU.
        kept_off: what lies within its CIDRs, and no route of ours may hide.
        hosts_inside: whether other hosts' underlay addresses are among it.
        errors: why it does not work on this host, or not fully.
        peer_errors: peers that this host cannot reach, and why.
    """

    plan: NetworkPlan | None = None
    refused: bool = False
    peers: int = 0
    path_mtu_bytes: int = 0
    kept_off: tuple[Occupant, ...] = ()
    hosts_inside: bool = False
    errors: tuple[str, ...] = ()
    peer_errors: Mapping[HostId, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """The desired kernel state, and each network's outcome."""

    state: KernelState
    networks: Mapping[NetworkName, NetworkOutcome] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostsPlan:
    """What some other hosts add to the desired kernel state.

    Attributes:
        peers: by network, how many of these hosts have a subnet of it.
        errors: by network, which of them this host cannot reach, and why.
    """

    state: KernelState
    peers: Mapping[NetworkName, int]
    errors: Mapping[NetworkName, Mapping[HostId, str]]


def plan_mesh(
    snapshot: MeshSnapshot, local: LocalView, underlay: Underlay, ids: NexthopIds
) -> MeshPlan:
    """The kernel state this host should have.

    Args:
        ids: gives nexthop objects their ids; it must have adopted those in the kernel.
    """
    state = KernelState()
    outcomes: dict[NetworkName, NetworkOutcome] = {}
    guarded: list[FirewallNetwork] = []
    others = Underlays(h for h in snapshot.hosts.values() if h.id != local.host)
    # Oldest first: where two networks exclude each other, every host must refuse the same one.
    for network in snapshot.networks.values():
        conflict = _find_conflict(network, outcomes, snapshot, underlay)
        if conflict is not None:
            outcomes[network.name] = NetworkOutcome(errors=(conflict,), refused=True)
            continue
        inside = others.inside(network)
        outcome = _plan_network(network, snapshot, local, underlay, inside, ids, state)
        outcomes[network.name] = outcome
        if outcome.plan is not None and outcome.plan.firewall is not None:
            guarded.append(outcome.plan.firewall)
    if guarded:
        state.firewall = firewall_for(guarded, underlay.ip)
    if any(network.links for network in guarded):
        _plan_sysctls(snapshot, underlay, state)
    return MeshPlan(state=state, networks=outcomes)


def plan_hosts(
    snapshot: MeshSnapshot,
    local: LocalView,
    underlay: Underlay,
    ids: NexthopIds,
    outcomes: Mapping[NetworkName, NetworkOutcome],
    hosts: Collection[HostId],
) -> HostsPlan:
    """The part of `plan_mesh` that some other hosts account for, at the cost of these hosts only.

    Args:
        outcomes: from `plan_mesh`, for the same networks, subnets and underlay.
    """
    state = KernelState()
    counts: dict[NetworkName, int] = {}
    errors: dict[NetworkName, dict[HostId, str]] = {}
    for name, outcome in outcomes.items():
        if outcome.plan is None:
            continue
        network = snapshot.networks[name]
        peers, errors[name] = _peers(network, snapshot, local, hosts, outcome.kept_off)
        counts[name] = len(peers)
        wanted = NetworkInput(
            network=network,
            subnets=local.subnets[name],
            endpoints=(),
            underlay=underlay,
            path_mtu_bytes=underlay.mtu_bytes,
            fallen=local.fallen_in(name),
            hosts_inside=outcome.hosts_inside,
        )
        backend = backend_of(network).on(underlay)
        errors[name] |= backend.plan_peers(wanted, peers, state, ids)
    return HostsPlan(state=state, peers=counts, errors=errors)


def probed_peers(
    network: Network,
    snapshot: MeshSnapshot,
    local: LocalView,
    underlay: Underlay,
    outcome: NetworkOutcome,
) -> dict[HostId, Peer]:
    """The peers that may need a network's fallback; other peers need no probes."""
    if not network.fallback:
        return {}
    backend = backend_of(network).on(underlay)
    hosts = snapshot.reservations.get(network.name, Reservations()).hosts
    peers, _ = _peers(network, snapshot, local, hosts, outcome.kept_off)
    return {peer.host.id: peer for peer in peers if backend.may_fall(network, peer, underlay)}


def fallen_peers(
    snapshot: MeshSnapshot, actual: KernelState
) -> frozenset[tuple[NetworkName, HostId]]:
    """The peers that a kernel reaches by the fallback, according to its routes.

    From these a restarted agent goes on where the last one stopped, and moves nobody.
    """
    networks = {
        backend_of(n).userspace_vtep(n): n.name for n in snapshot.networks.values() if n.fallback
    }
    fallen = {
        key: networks[r.via.dev]
        for key, r in actual.routes.items()
        if r.via and r.via.dev in networks
    }
    return frozenset(
        (name, owner)
        for name in set(fallen.values())
        for subnet, owner in snapshot.reservations.get(name, Reservations()).items()
        if fallen.get(route_key(subnet)) == name
    )


def _find_conflict(
    network: Network, earlier: Iterable[NetworkName], snapshot: MeshSnapshot, underlay: Underlay
) -> str | None:
    """Why a network excludes an older one, and is refused; None: it excludes none.

    `meshnet.store.registry` never creates two such networks, but other writers of etcd may.  It
    does create networks that conflict only on hosts without kernel VXLAN.
    """
    for name in earlier:
        conflict = find_conflict(
            network, snapshot.networks[name], kernel_vxlan=underlay.kernel_vxlan
        )
        if conflict is not None:
            return f"{conflict.problem}: {conflict.mend}"
    return None


def plan_takeovers(snapshot: MeshSnapshot, underlay: Underlay) -> dict[str, Network]:
    """The bridges that should take over links of this host, and the network of each."""
    names = list(snapshot.networks)
    bridges = {}
    for number, network in enumerate(snapshot.networks.values()):
        bridge = backend_of(network).takeover_bridge(network)
        if (
            bridge is not None
            and _find_conflict(network, names[:number], snapshot, underlay) is None
            and missing_parent(network, underlay) is None
        ):
            bridges[bridge] = network
    return bridges


def _plan_network(
    network: Network,
    snapshot: MeshSnapshot,
    local: LocalView,
    underlay: Underlay,
    inside: Sequence[Occupant],
    ids: NexthopIds,
    state: KernelState,
) -> NetworkOutcome:
    """The outcome of one network, whose objects go to `state`.

    Args:
        inside: other hosts' underlay addresses in its CIDRs.
    """
    backend = backend_of(network).on(underlay)
    blocked = backend.blocked(network, underlay, local.takeovers.get(network.name))
    if blocked is not None:
        return NetworkOutcome(errors=(blocked.reason,), refused=blocked.refused)
    subnets = local.subnets.get(network.name, ())
    occupied = (*store_occupants(local.store_addresses), *underlay.occupied)
    problem = refusal(network, subnets, occupied)
    if problem is not None:
        return NetworkOutcome(errors=(problem,), refused=True)
    if not subnets:
        return NetworkOutcome(errors=("this host has no subnet of this network yet",))
    held = snapshot.reservations.get(network.name, Reservations())
    avoided = (*kept_off(network, occupied), *inside)
    peers, errors = _peers(network, snapshot, local, held.hosts, avoided)
    endpoints = [e for e in local.endpoints if e.network == network.name]
    wanted = NetworkInput(
        network=network,
        subnets=subnets,
        endpoints=endpoints,
        host_addresses=local.addresses.get(network.name, ()),
        underlay=underlay,
        path_mtu_bytes=_narrowest(peers, underlay),
        fallen=local.fallen_in(network.name),
        hosts_inside=bool(inside),
    )
    plan = backend.plan_host(wanted, state)
    errors |= backend.plan_peers(wanted, peers, state, ids)
    return NetworkOutcome(
        plan=plan,
        peers=len(peers),
        path_mtu_bytes=0 if network.mtu_bytes is not None else wanted.path_mtu_bytes,
        kept_off=avoided,
        hosts_inside=bool(inside),
        errors=(*plan.errors, *_stranded(endpoints, subnets), *strangers(network, inside)),
        peer_errors=errors,
    )


def _narrowest(peers: Iterable[Peer], underlay: Underlay) -> int:
    """MTU of the narrowest path to a peer."""
    narrow = {
        ip: p.mtu_bytes for ip, p in underlay.paths.items() if p.mtu_bytes < underlay.mtu_bytes
    }
    if not narrow:
        return underlay.mtu_bytes
    mtus = (narrow.get(peer.host.underlay_ip, underlay.mtu_bytes) for peer in peers)
    return min(mtus, default=underlay.mtu_bytes)


def _stranded(endpoints: Sequence[Endpoint], subnets: Sequence[IpNetwork]) -> list[str]:
    """Endpoints whose subnet was given to another host while this one was away."""
    return [
        f"endpoint {e.name} has {a}, which is no longer in a subnet of this host: detach and "
        "attach it again"
        for e in endpoints
        for a in e.addresses
        if a.network not in subnets
    ]


def _peers(
    network: Network,
    snapshot: MeshSnapshot,
    local: LocalView,
    hosts: Iterable[HostId],
    avoided: Sequence[Occupant],
) -> tuple[list[Peer], dict[HostId, str]]:
    """Those of `hosts` that are not this one and have usable subnets of the network.

    Args:
        avoided: what no route to a subnet may hide.
    """
    peers: list[Peer] = []
    errors: dict[HostId, str] = {}
    held = snapshot.reservations.get(network.name, Reservations())
    for owner in hosts:
        subnets = held.of(owner)
        if not subnets or owner == local.host or owner in local.expired:
            continue
        host = snapshot.hosts.get(owner)
        if host is None:
            owned = ", ".join(map(str, subnets))
            errors[owner] = (
                f"subnet {owned} belongs to host {owner}, which has no entry in etcd: start its "
                f"agent, or run meshnet host rm {owner}"
            )
            continue
        good = subnets
        if not all(map(network.is_host_subnet, subnets)):
            good = tuple(s for s in subnets if network.is_host_subnet(s))
            bad = ", ".join(str(s) for s in subnets if s not in good)
            errors[owner] = (
                f"subnet {bad} of host {owner} is not a host subnet of network {network.name}"
            )
        for subnet in good if avoided else ():
            hidden = hidden_by(subnet, avoided)
            if hidden is not None:
                # Not even its other subnet: the tunnel's MAC is that of both.
                good = ()
                errors[owner] = (
                    f"host {owner} is not reached from here, for its subnet {subnet} overlaps "
                    f"{hidden.prefix}, {hidden.what}: give that other addresses"
                )
        if good:
            peers.append(Peer(host, good))
    return peers, errors


def _plan_sysctls(snapshot: MeshSnapshot, underlay: Underlay, state: KernelState) -> None:
    """Enable forwarding on the links by which packets from outside the networks may come.

    IPv6 has one switch for the whole host.  A host that forwards ignores router advertisements
    unless ``accept_ra`` is 2 (Documentation/networking/ip-sysctl.rst), and its addresses and
    default routes may come from them.
    """
    for dev in underlay.forwarding_links:
        state.sysctls[f"net/ipv4/conf/{dev}/forwarding"] = "1"
    if any(s.version == 6 for n in snapshot.networks.values() for s in n.subnets) and underlay.ipv6:
        # accept_ra first: otherwise the kernel would drop those routes between the two writes.
        for dev in underlay.ra_links:
            state.sysctls[f"net/ipv6/conf/{dev}/accept_ra"] = "2"
        state.sysctls["net/ipv6/conf/all/forwarding"] = "1"
