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
    from meshnet.model import Host, HostId, IpNetwork, Network
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


class VxlanBackend:
    """The mode (see `meshnet.backends.Backend`)."""

    def plan_host(self, wanted: NetworkInput, state: KernelState) -> NetworkPlan:
        """Bridge, VXLAN device, gateway addresses, and a stop for packets to nobody."""
        network = wanted.network
        errors: list[str] = []
        mtu = _mtu(wanted, errors)
        _plan_links(wanted, mtu, state)
        versions = {s.version for s in wanted.subnets}
        for cidr in network.subnets:
            if cidr.version in versions and cidr not in wanted.subnets:
                # Else packets to a subnet nobody owns would leave by the host's default route.
                state.routes[_route_key(cidr)] = Route(0)
        links = (bridge_name(network), vxlan_name(network))
        return NetworkPlan(
            mtu_bytes=mtu,
            bridge=bridge_name(network),
            firewall=FirewallNetwork(links, network.port, network.subnets, wanted.subnets),
            errors=tuple(errors),
        )

    def plan_peers(
        self, wanted: NetworkInput, peers: Iterable[Peer], state: KernelState, ids: NexthopIds
    ) -> dict[HostId, str]:
        """Nexthop, route, neighbour and FDB entry of each peer."""
        underlay, direct = wanted.underlay, wanted.network.direct_routing
        dev = vxlan_name(wanted.network)
        sources = {s.version: gateway_of(s).packed for s in wanted.subnets}
        errors: dict[HostId, str] = {}
        for peer in peers:
            host = peer.host
            if host.underlay_ip == underlay.ip:
                errors[host.id] = (
                    f"host {host.id} has this host's underlay address {underlay.ip}: give every "
                    "agent its own, or remove that host (meshnet host rm)"
                )
                continue
            for subnet in peer.subnets:
                source = sources.get(subnet.version)
                if source is None:
                    continue
                nexthop = _direct(host, subnet, underlay) if direct else None
                if nexthop is None and host.underlay_ip.version != underlay.ip.version:
                    errors[host.id] = _unreachable(host, underlay)
                    continue
                nexthop = nexthop or _plan_tunnel(dev, peer, subnet, state)
                if underlay.nexthop_objects:
                    nexthop_id = ids.id_of(nexthop)
                    state.nexthops[nexthop_id] = nexthop
                    state.routes[_route_key(subnet)] = Route(nexthop_id, source)
                else:
                    state.routes[_route_key(subnet)] = Route(0, source, nexthop)
        return errors


VXLAN = VxlanBackend()


def _unreachable(host: Host, underlay: Underlay) -> str:
    return (
        f"host {host.id} has underlay address {host.underlay_ip}, this host {underlay.ip}: give "
        "both agents addresses of one IP version"
    )


def link_local_of(mac: bytes) -> PackedIp:
    """The IPv6 link-local address of a MAC: modified EUI-64 (RFC 4291, appendix A)."""
    return b"\xfe\x80" + bytes(6) + bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:]


def _plan_links(wanted: NetworkInput, mtu: int, state: KernelState) -> None:
    network, underlay = wanted.network, wanted.underlay
    primary = wanted.subnets[0]
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


def _plan_tunnel(dev: str, peer: Peer, subnet: IpNetwork, state: KernelState) -> Nexthop:
    mac = vtep_mac(peer.subnets[0])
    gateway = subnet.network_address.packed if subnet.version == 4 else link_local_of(mac)
    state.neighbours[NeighbourKey(dev, gateway)] = mac
    state.fdb[FdbKey(dev, mac)] = peer.host.underlay_ip.packed
    return Nexthop(dev, gateway)


def _direct(host: Host, subnet: IpNetwork, underlay: Underlay) -> Nexthop | None:
    """The nexthop on the underlay, if the peer can be reached by it without a tunnel."""
    path = underlay.paths.get(host.underlay_ip)
    if path is None or not path.on_link:
        return None
    if host.underlay_ip.version != subnet.version:
        return None  # linux/nexthop.h: a nexthop has one family, and IPv6 has no IPv4 gateways
    return Nexthop(path.dev, host.underlay_ip.packed)


def _mtu(wanted: NetworkInput, errors: list[str]) -> int:
    """The network's own MTU, or what the narrowest path to a peer leaves."""
    network, underlay = wanted.network, wanted.underlay
    if network.mtu_bytes is not None:
        return network.mtu_bytes
    inner = max(s.version for s in network.subnets)
    try:
        return overlay_mtu_bytes(wanted.path_mtu_bytes, underlay.ip.version, inner)
    except UsageError as error:
        errors.append(str(error))
        return MINIMUM_MTU_BYTES[inner]


def _route_key(subnet: IpNetwork) -> RouteKey:
    return RouteKey(subnet.network_address.packed, subnet.prefixlen)
