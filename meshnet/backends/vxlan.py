"""``vxlan``: one VXLAN device and one bridge a network, one route a remote host.

::

    endpoint eth0 ── mne… ┐
    endpoint eth0 ── mne… ┴ mnb<VNI> 10.42.1.1 ──(routing)── mnv<VNI> ── UDP ── underlay

The cost in kernel objects, for each remote host and IP version: one nexthop object, one route
through it, one permanent neighbour; and one FDB entry a host.  Endpoints of other hosts cost
nothing here: state grows with hosts, not with containers.  Nothing is learned from packets.

The neighbour that stands for a remote VTEP is its subnet's own address for IPv4 (10.42.3.0, which
no endpoint can have) and the link-local address made from its MAC for IPv6.  An on-link
IPv6 gateway is refused where a route over another link covers it; a link-local one is never looked
up (``ip6_validate_gw`` in net/ipv6/route.c, docs/design/ipv6-gateways.md).

With ``direct_routing`` a peer whose underlay address is on-link gets a nexthop on the underlay link
and no tunnel objects.

RFC 7348; linux/if_link.h, linux/nexthop.h, linux/neighbour.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.backends import NetworkPlan
from meshnet.errors import UsageError
from meshnet.firewall import FirewallNetwork
from meshnet.ipam import gateway_of
from meshnet.state import (
    AddressKey,
    FdbKey,
    Link,
    LinkKind,
    NeighbourKey,
    Nexthop,
    Route,
    RouteKey,
    Vxlan,
)
from meshnet.wire.mac import gateway_mac, vtep_mac
from meshnet.wire.mtu import MINIMUM_MTU_BYTES, overlay_mtu_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from meshnet.backends import NetworkInput, NexthopIds, Peer, Underlay
    from meshnet.model import HostId, IpNetwork, Network
    from meshnet.state import KernelState, PackedIp


def bridge_name(network: Network) -> str:
    """Name of the network's bridge; at most 11 characters."""
    return f"mnb{network.vni}"


def vxlan_name(network: Network) -> str:
    """Name of the network's VXLAN device; at most 11 characters."""
    return f"mnv{network.vni}"


def endpoint_link_name(endpoint_id: str) -> str:
    """Name of the host-side link of an endpoint: 15 characters, the most a link may have."""
    return f"mne{endpoint_id}"


def plan_vxlan(wanted: NetworkInput, state: KernelState, ids: NexthopIds) -> NetworkPlan:
    """Add one VXLAN network to the desired state (see `meshnet.backends.Backend`)."""
    network, underlay = wanted.network, wanted.underlay
    errors: list[str] = []
    mtu = _mtu(wanted, errors)
    _plan_links(wanted, mtu, state)
    sources = {s.version: gateway_of(s).packed for s in wanted.subnets}
    macs = _vtep_macs(wanted)
    for peer in wanted.peers:
        version = peer.subnet.version
        if version not in sources:
            continue
        nexthop = _direct(peer, underlay) if network.direct_routing else None
        if peer.host.underlay_ip == underlay.ip:
            errors.append(
                f"host {peer.host.id} has this host's underlay address {underlay.ip}: give every "
                "agent its own, or remove that host (meshnet host rm)"
            )
            continue
        if nexthop is None:
            if peer.host.underlay_ip.version != underlay.ip.version:
                errors.append(
                    f"host {peer.host.id} has underlay address {peer.host.underlay_ip}, this host "
                    f"{underlay.ip}: give both agents addresses of one IP version"
                )
                continue
            nexthop = _plan_tunnel(vxlan_name(network), peer, macs[peer.host.id], state)
        route = Route(0, sources[version], nexthop)
        if underlay.nexthop_objects:
            route = Route(ids.id_of(nexthop), sources[version])
            state.nexthops[route.nexthop_id] = nexthop
        state.routes[_route_key(peer.subnet)] = route
    for cidr in network.subnets:
        if cidr.version in sources and cidr not in wanted.subnets:
            # Else packets to a subnet nobody owns would leave by the host's default route.
            state.routes.setdefault(_route_key(cidr), Route(0))
    return NetworkPlan(
        mtu_bytes=mtu,
        bridge=bridge_name(network),
        firewall=FirewallNetwork(
            (bridge_name(network), vxlan_name(network)),
            network.port,
            network.subnets,
            wanted.subnets,
        ),
        errors=tuple(errors),
    )


def _primary(subnets: Iterable[IpNetwork]) -> IpNetwork:
    """The one of a host's subnets that its MACs are computed from."""
    return min(subnets, key=lambda s: (s.version, int(s.network_address)))


def _vtep_macs(wanted: NetworkInput) -> dict[HostId, bytes]:
    """Each peer's VTEP MAC, as the peer itself computes it."""
    subnets: dict[HostId, list[IpNetwork]] = {}
    for peer in wanted.peers:
        subnets.setdefault(peer.host.id, []).append(peer.subnet)
    return {host: vtep_mac(_primary(owned)) for host, owned in subnets.items()}


def link_local_of(mac: bytes) -> PackedIp:
    """The IPv6 link-local address of a MAC: modified EUI-64 (RFC 4291, appendix A)."""
    return b"\xfe\x80" + bytes(6) + bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:]


def _plan_links(wanted: NetworkInput, mtu: int, state: KernelState) -> None:
    network, underlay = wanted.network, wanted.underlay
    primary = _primary(wanted.subnets)
    bridge = bridge_name(network)
    state.links[bridge] = Link(
        LinkKind.BRIDGE,
        mtu,
        gateway_mac(primary),
        sysctls=_sysctls(wanted.subnets, underlay, mtu, tunnel=False),
    )
    state.links[vxlan_name(network)] = Link(
        LinkKind.VXLAN,
        mtu,
        vtep_mac(primary),
        vxlan=Vxlan(network.vni, network.port, underlay.ip.packed),
        sysctls=_sysctls(wanted.subnets, underlay, mtu, tunnel=True),
    )
    for subnet in wanted.subnets:
        state.addresses[AddressKey(bridge, gateway_of(subnet).packed, subnet.prefixlen)] = True
    for endpoint in wanted.endpoints:
        state.links[endpoint_link_name(endpoint.id)] = Link(
            LinkKind.VETH, endpoint.mtu_bytes, None, master=bridge
        )


def _sysctls(
    subnets: Sequence[IpNetwork], underlay: Underlay, mtu: int, *, tunnel: bool
) -> tuple[tuple[str, str, str], ...]:
    """Per-interface settings.

    ``rp_filter`` must not be strict: with direct routing a peer's packets may arrive by the tunnel
    while the route back is direct.  It is off, but loose where the host's own setting, of which the
    larger one counts, is strict.  Without an IPv6 subnet IPv6 is off on the link.
    """
    rp_filter = "2" if underlay.strict_rp_filter else "0"
    settings = [("ipv4", "forwarding", "1"), ("ipv4", "rp_filter", rp_filter)]
    # Below its smallest MTU the kernel gives a link no IPv6, nor settings for it.
    if underlay.ipv6 and mtu >= MINIMUM_MTU_BYTES[6]:
        if any(s.version == 6 for s in subnets):
            settings += [("ipv6", "accept_dad", "0"), ("ipv6", "accept_ra", "0")]
            if tunnel:
                settings.append(("ipv6", "addr_gen_mode", "1"))
            settings.append(("ipv6", "disable_ipv6", "0"))
        else:
            settings.append(("ipv6", "disable_ipv6", "1"))
    return tuple(settings)


def _plan_tunnel(dev: str, peer: Peer, mac: bytes, state: KernelState) -> Nexthop:
    subnet = peer.subnet
    gateway = subnet.network_address.packed if subnet.version == 4 else link_local_of(mac)
    state.neighbours[NeighbourKey(dev, gateway)] = mac
    state.fdb[FdbKey(dev, mac)] = peer.host.underlay_ip.packed
    return Nexthop(dev, gateway)


def _direct(peer: Peer, underlay: Underlay) -> Nexthop | None:
    """The nexthop on the underlay, if the peer can be reached by it without a tunnel."""
    path = underlay.paths.get(peer.host.underlay_ip)
    if path is None or not path.on_link:
        return None
    if peer.host.underlay_ip.version != peer.subnet.version:
        return None  # linux/nexthop.h: a nexthop has one family, and IPv6 has no IPv4 gateways
    return Nexthop(path.dev, peer.host.underlay_ip.packed)


def _mtu(wanted: NetworkInput, errors: list[str]) -> int:
    """The network's own MTU, or what the narrowest path to a peer leaves."""
    network, underlay = wanted.network, wanted.underlay
    if network.mtu_bytes is not None:
        return network.mtu_bytes
    narrowest = underlay.mtu_bytes
    for peer in wanted.peers:
        path = underlay.paths.get(peer.host.underlay_ip)
        if path is not None and path.mtu_bytes < narrowest:
            narrowest = path.mtu_bytes
    inner = max(s.version for s in network.subnets)
    try:
        return overlay_mtu_bytes(narrowest, underlay.ip.version, inner)
    except UsageError as error:
        errors.append(str(error))
        return MINIMUM_MTU_BYTES[inner]


def _route_key(subnet: IpNetwork) -> RouteKey:
    return RouteKey(subnet.network_address.packed, subnet.prefixlen)
