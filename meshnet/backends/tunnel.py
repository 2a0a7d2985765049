"""What the modes with a tunnel share: each host has a subnet, and routes to the others'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.backends import Addressing, Backend, Setting
from meshnet.backends.routed_bridge import link_sysctls
from meshnet.errors import UsageError
from meshnet.firewall.elements import member
from meshnet.ipam import check_host_prefix, gateway_of
from meshnet.state import Link, Nexthop, Route, RouteKey, Vxlan
from meshnet.wire.mac import vtep_mac
from meshnet.wire.mtu import MINIMUM_MTU_BYTES, overlay_mtu_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet.backends import NetworkInput, NexthopIds, Peer, Underlay
    from meshnet.model import Host, IpNetwork, Network
    from meshnet.state import KernelState, LinkKind, PackedIp

DIRECT = "direct"
"""Name of the path to a peer without a tunnel."""


class TunnelBackend(Backend):
    """A mode with a tunnel; packets to on-link peers may bypass it."""

    addressing = Addressing.SUBNETS
    settings = frozenset(
        {Setting.DIRECT_ROUTING, Setting.PORT, Setting.HOST_PREFIX, Setting.HOST_PREFIX6}
    )

    def check_cidr(self, cidr: IpNetwork, host_prefix: int) -> None:
        """Refuse a CIDR that host subnets do not fit into."""
        check_host_prefix(cidr, host_prefix)

    def path_to(self, network: Network, peer: Peer, underlay: Underlay, *, fallen: bool) -> str:
        """The mode's name, or ``direct``."""
        return DIRECT if is_direct(network, peer, underlay) else self.mode


def overlay_mtu(wanted: NetworkInput) -> tuple[int, tuple[str, ...]]:
    """MTU of endpoints, and any problem with it, in words.

    It is the network's own, or what the narrowest path to a peer leaves after encapsulation.
    """
    network, underlay = wanted.network, wanted.underlay
    if network.mtu_bytes is not None:
        return network.mtu_bytes, ()
    # One MTU serves both versions of a dual-stack network, and IPv6 needs the larger minimum.
    inner = max(s.version for s in network.subnets)
    try:
        return overlay_mtu_bytes(wanted.path_mtu_bytes, underlay.ip.version, inner), ()
    except UsageError as error:
        return MINIMUM_MTU_BYTES[inner], (str(error),)


def vtep_link(wanted: NetworkInput, kind: LinkKind, mtu_bytes: int, port: int) -> Link:
    """The link of this host's VTEP of the network, at a UDP port."""
    network, underlay = wanted.network, wanted.underlay
    return Link(
        kind,
        mtu_bytes,
        vtep_mac(wanted.subnets[0]),
        vxlan=Vxlan(network.vni, port, underlay.ip.packed),
        sysctls=link_sysctls(wanted.subnets, underlay, mtu_bytes, tunnel=True),
    )


def others_cidrs(wanted: NetworkInput) -> list[IpNetwork]:
    """The network's CIDRs that other hosts share, of the IP versions that this host has.

    A CIDR that is this host's subnet as a whole has no room for another host.  None where a route
    for the whole CIDR would lead packets for other hosts' underlay addresses astray.
    """
    if wanted.hosts_inside:
        return []
    versions = {s.version for s in wanted.subnets}
    return [
        cidr
        for cidr in wanted.network.subnets
        if cidr.version in versions and cidr not in wanted.subnets
    ]


def sources(wanted: NetworkInput) -> dict[int, PackedIp]:
    """Preferred source addresses of the host's own packets, by IP version: the gateways."""
    return {s.version: gateway_of(s).packed for s in wanted.subnets}


def admit_members(peers: Iterable[Peer], underlay: Underlay, state: KernelState) -> None:
    """Accept tunnel packets from every host that takes part in a network."""
    for peer in peers:
        # Also peers that are reached directly: whether they use the tunnel back is their choice.
        if peer.host.underlay_ip.version == underlay.ip.version:
            state.elements[member(peer.host.underlay_ip)] = b""


def add_route(
    state: KernelState,
    ids: NexthopIds,
    underlay: Underlay,
    subnet: IpNetwork,
    nexthop: Nexthop,
    source: PackedIp,
) -> None:
    """Add a route to a peer's subnet, with its nexthop object where the kernel has them."""
    if underlay.nexthop_objects:
        nexthop_id = ids.id_of(nexthop)
        state.nexthops[nexthop_id] = nexthop
        state.routes[route_key(subnet)] = Route(nexthop_id, source)
    else:
        state.routes[route_key(subnet)] = Route(0, source, nexthop)


def direct_nexthop(host: Host, subnet: IpNetwork, underlay: Underlay) -> Nexthop | None:
    """The nexthop on the underlay, if the peer can be reached without a tunnel."""
    path = underlay.paths.get(host.underlay_ip)
    if path is None or not path.on_link:
        return None
    if host.underlay_ip.version != subnet.version:
        # A nexthop object has one family (linux/nexthop.h), and its gateway is of that family.
        return None
    return Nexthop(path.dev, host.underlay_ip.packed)


def is_direct(network: Network, peer: Peer, underlay: Underlay) -> bool:
    """Whether all of a peer's subnets are reached without a tunnel."""
    return network.direct_routing and all(
        direct_nexthop(peer.host, subnet, underlay) is not None for subnet in peer.subnets
    )


def is_self(host: Host, underlay: Underlay) -> str | None:
    """Why a peer with this host's own underlay address cannot be reached; None: it has another."""
    if host.underlay_ip != underlay.ip:
        return None
    return (
        f"host {host.id} has this host's underlay address {underlay.ip}: give every agent its own, "
        "or remove that host (meshnet host rm)"
    )


def is_of_other_version(host: Host, underlay: Underlay) -> str | None:
    """Why no tunnel leads to a peer whose underlay address is of another IP version."""
    if host.underlay_ip.version == underlay.ip.version:
        return None
    return (
        f"host {host.id} has underlay address {host.underlay_ip}, this host {underlay.ip}: give "
        "both agents addresses of the same IP version"
    )


def route_key(subnet: IpNetwork) -> RouteKey:
    """Key of the route to a subnet."""
    return RouteKey(subnet.network_address.packed, subnet.prefixlen)
