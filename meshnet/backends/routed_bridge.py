"""Our bridge that endpoints hang on, and through which the host routes their packets.

A backend with a tunnel adds that (`meshnet.backends.tunnel`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.backends import NetworkPlan
from meshnet.firewall import FirewallNetwork
from meshnet.firewall.elements import endpoint_elements
from meshnet.ipam import gateway_of
from meshnet.state import (
    AddressKey,
    Link,
    LinkKind,
    endpoint_link_name,
)
from meshnet.wire.mac import gateway_mac
from meshnet.wire.mtu import MINIMUM_MTU_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from meshnet.backends import NetworkInput, Underlay
    from meshnet.model import IpNetwork, Network
    from meshnet.state import KernelState


def bridge_name(network: Network) -> str:
    """Name of the network's bridge; at most 11 characters."""
    return f"mnb{network.vni}"


def plan_bridge(
    wanted: NetworkInput, mtu_bytes: int, tunnels: Mapping[str, int], state: KernelState
) -> NetworkPlan:
    """Add the network's bridge with its gateway addresses and endpoints to `state`.

    Args:
        tunnels: the network's tunnel devices, which the backend adds, and their UDP ports.
    """
    network = wanted.network
    bridge = bridge_name(network)
    state.links[bridge] = Link(
        LinkKind.BRIDGE,
        mtu_bytes,
        gateway_mac(wanted.subnets[0]),
        sysctls=link_sysctls(wanted.subnets, wanted.underlay, mtu_bytes, tunnel=False),
    )
    for subnet in wanted.subnets:
        state.addresses[AddressKey(bridge, gateway_of(subnet).packed, subnet.prefixlen)] = True
    for endpoint in wanted.endpoints:
        # No MAC: nothing refers to the host's end, and the kernel's random one will do.
        state.links[endpoint_link_name(endpoint.id)] = Link(
            LinkKind.VETH, endpoint.mtu_bytes, None, master=bridge, hairpin=True
        )
        state.elements.update(endpoint_elements(endpoint))
    firewall = FirewallNetwork(
        links=(bridge, *tunnels),
        ports=tuple(tunnels.values()),
        cidrs=network.subnets,
        subnets=tuple(wanted.subnets),
        vni=network.vni,
        internal=network.internal,
        direct=network.direct_routing,
    )
    return NetworkPlan(mtu_bytes=mtu_bytes, uplink=bridge, firewall=firewall)


def link_sysctls(
    subnets: Sequence[IpNetwork], underlay: Underlay, mtu: int, *, tunnel: bool
) -> tuple[tuple[str, str, str], ...]:
    """Per-interface settings.

    ``rp_filter`` must not be strict: with direct routing a peer's packets may arrive by the tunnel
    while the route back is direct.  It is off, unless the host's own setting is strict: the kernel
    uses the larger of the two, and loose (2) outranks strict (1).  Without an IPv6 subnet IPv6 is
    off on the link.

    ``route_localnet`` lets answers reach 127.0.0.1, where published ports can be reached, too.  The
    firewall drops everything else that comes to that address.
    """
    rp_filter = "2" if underlay.strict_rp_filter else "0"
    settings = [("ipv4", "forwarding", "1"), ("ipv4", "rp_filter", rp_filter)]
    if not tunnel:
        settings.append(("ipv4", "route_localnet", "1"))
    # On a link with an MTU below IPv6's minimum these settings do not exist.
    if underlay.ipv6 and mtu >= MINIMUM_MTU_BYTES[6]:
        if any(s.version == 6 for s in subnets):
            settings += [("ipv6", "accept_dad", "0"), ("ipv6", "accept_ra", "0")]
            if tunnel:
                # No link-local address: peers' gateways are such addresses, made of their MACs.
                settings.append(("ipv6", "addr_gen_mode", "1"))
            settings.append(("ipv6", "disable_ipv6", "0"))
        else:
            settings.append(("ipv6", "disable_ipv6", "1"))
    return tuple(settings)
