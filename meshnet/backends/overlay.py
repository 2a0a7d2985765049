"""What the modes with a bridge of ours have in common, and the way to a peer without a tunnel.

A backend plans its tunnel beside it (`meshnet.backends.vxlan`, `meshnet.backends.udp`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.backends import NetworkPlan
from meshnet.errors import UsageError
from meshnet.firewall import FirewallNetwork
from meshnet.firewall.elements import endpoint_elements
from meshnet.ipam import gateway_of
from meshnet.state import (
    AddressKey,
    Link,
    LinkKind,
    Nexthop,
    Route,
    RouteKey,
    Vxlan,
    endpoint_link_name,
)
from meshnet.wire.mac import gateway_mac, vtep_mac
from meshnet.wire.mtu import MINIMUM_MTU_BYTES, overlay_mtu_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.backends import NetworkInput, NexthopIds, Underlay
    from meshnet.model import Host, IpNetwork, Network
    from meshnet.state import KernelState, PackedIp


def bridge_name(network: Network) -> str:
    """Name of the network's bridge; at most 11 characters."""
    return f"mnb{network.vni}"


def plan_bridge(wanted: NetworkInput, tunnel: str | None, state: KernelState) -> NetworkPlan:
    """Add the network's bridge with its gateway addresses and endpoints to `state`.

    Args:
        tunnel: name of the network's tunnel device, which the backend adds; None: it has none.
    """
    network = wanted.network
    errors: list[str] = []
    if tunnel is not None:
        mtu = _overlay_mtu(wanted, errors)
    else:
        mtu = network.mtu_bytes if network.mtu_bytes is not None else wanted.underlay.mtu_bytes
    bridge = bridge_name(network)
    state.links[bridge] = Link(
        LinkKind.BRIDGE,
        mtu,
        gateway_mac(wanted.subnets[0]),
        sysctls=link_sysctls(wanted.subnets, wanted.underlay, mtu, tunnel=False),
    )
    for subnet in wanted.subnets:
        state.addresses[AddressKey(bridge, gateway_of(subnet).packed, subnet.prefixlen)] = True
    for endpoint in wanted.endpoints:
        state.links[endpoint_link_name(endpoint.id)] = Link(
            LinkKind.VETH, endpoint.mtu_bytes, None, master=bridge, hairpin=True
        )
        state.elements.update(endpoint_elements(endpoint))
    firewall = FirewallNetwork(
        links=(bridge,) if tunnel is None else (bridge, tunnel),
        ports=() if tunnel is None else (network.port,),
        cidrs=network.subnets,
        subnets=tuple(wanted.subnets),
        vni=network.vni,
        internal=network.internal,
        direct=network.direct_routing,
    )
    return NetworkPlan(
        mtu_bytes=mtu,
        uplink=bridge,
        firewall=firewall,
        errors=tuple(errors),
    )


def vtep_link(wanted: NetworkInput, kind: LinkKind, mtu_bytes: int, port: int) -> Link:
    """The link that this host's VTEP of the network is, at a UDP port."""
    network, underlay = wanted.network, wanted.underlay
    return Link(
        kind,
        mtu_bytes,
        vtep_mac(wanted.subnets[0]),
        vxlan=Vxlan(network.vni, port, underlay.ip.packed),
        sysctls=link_sysctls(wanted.subnets, underlay, mtu_bytes, tunnel=True),
    )


def others_cidrs(wanted: NetworkInput) -> list[IpNetwork]:
    """The network's CIDRs that other hosts have a part of, of IP versions that this host has."""
    versions = {s.version for s in wanted.subnets}
    return [
        cidr
        for cidr in wanted.network.subnets
        if cidr.version in versions and cidr not in wanted.subnets
    ]


def sources(wanted: NetworkInput) -> dict[int, PackedIp]:
    """Preferred source addresses of the host's own packets, by IP version: the gateways."""
    return {s.version: gateway_of(s).packed for s in wanted.subnets}


def link_sysctls(
    subnets: Sequence[IpNetwork], underlay: Underlay, mtu: int, *, tunnel: bool
) -> tuple[tuple[str, str, str], ...]:
    """Per-interface settings.

    ``rp_filter`` must not be strict: with direct routing a peer's packets may arrive by the tunnel
    while the route back is direct.  It is off, but loose where the host's own setting, of which the
    larger one counts, is strict.  Without an IPv6 subnet IPv6 is off on the link.

    ``route_localnet`` is for answers to 127.0.0.1, which published ports are reached at, too; the
    firewall drops what else comes to that address.
    """
    rp_filter = "2" if underlay.strict_rp_filter else "0"
    settings = [("ipv4", "forwarding", "1"), ("ipv4", "rp_filter", rp_filter)]
    if not tunnel:
        settings.append(("ipv4", "route_localnet", "1"))
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


def set_way(
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
    """The nexthop on the underlay, if the peer can be reached by it without a tunnel."""
    path = underlay.paths.get(host.underlay_ip)
    if path is None or not path.on_link:
        return None
    if host.underlay_ip.version != subnet.version:
        return None  # linux/nexthop.h: a nexthop has one family, and IPv6 has no IPv4 gateways
    return Nexthop(path.dev, host.underlay_ip.packed)


def is_self(host: Host, underlay: Underlay) -> str | None:
    """Why a peer that has this host's own address cannot be had."""
    if host.underlay_ip != underlay.ip:
        return None
    return (
        f"host {host.id} has this host's underlay address {underlay.ip}: give every agent its own, "
        "or remove that host (meshnet host rm)"
    )


def is_of_other_version(host: Host, underlay: Underlay) -> str | None:
    """Why a peer whose underlay address is of another IP version cannot be had by a tunnel."""
    if host.underlay_ip.version == underlay.ip.version:
        return None
    return (
        f"host {host.id} has underlay address {host.underlay_ip}, this host {underlay.ip}: give "
        "both agents addresses of one IP version"
    )


def _overlay_mtu(wanted: NetworkInput, errors: list[str]) -> int:
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


def route_key(subnet: IpNetwork) -> RouteKey:
    """Key of the route to a subnet."""
    return RouteKey(subnet.network_address.packed, subnet.prefixlen)
