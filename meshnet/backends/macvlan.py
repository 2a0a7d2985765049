"""``macvlan``: endpoints on the physical network, each with its own MAC and address there.

::

    endpoint eth0 (macvlan) ─┐
    endpoint eth0 (macvlan) ─┴── the host's link on the physical network ── switch ── gateway

A macvlan is made on the host's link, directly in the endpoint's namespace.  The host's namespace
has nothing of it, and its packets pass through neither the host's routing nor its firewall.
Between hosts the physical network carries packets as they are.

A macvlan and the link that it is on do not hear each other, so neither do a host and its own
endpoints.  With ``host_access`` the host has a macvlan, too, ``mns<VNI>``, with an address from the
pool and a route to each of its own endpoints: macvlans in bridge mode do hear each other.  Its own
endpoints reach the host at that address.

linux/if_link.h (IFLA_MACVLAN_MODE), drivers/net/macvlan.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.backends import LinkNames, NetworkPlan, Setting
from meshnet.backends.physical import PhysicalBackend, endpoint_mtu
from meshnet.backends.routed_bridge import link_sysctls
from meshnet.modes import Mode
from meshnet.state import AddressKey, Link, LinkKind, Nexthop, Route, RouteKey
from meshnet.wire.mac import endpoint_mac

if TYPE_CHECKING:
    from meshnet.backends import NetworkInput
    from meshnet.model import Network
    from meshnet.state import KernelState


def shim_name(network: Network) -> str:
    """Name of the macvlan by which a host reaches its own endpoints; at most 11 characters."""
    return f"mns{network.vni}"


class MacvlanBackend(PhysicalBackend):
    """The mode (see `meshnet.backends.Backend`)."""

    mode = Mode.MACVLAN
    settings = PhysicalBackend.settings | {Setting.HOST_ACCESS}

    def link_names(self, network: Network) -> LinkNames:
        """The host's own macvlan, and the link that it is on."""
        return LinkNames(local=(shim_name(network),), parents=(network.parent or "",))

    def plan_host(self, wanted: NetworkInput, state: KernelState) -> NetworkPlan:
        """Nothing, or with ``host_access`` the host's own macvlan and the routes through it."""
        network = wanted.network
        parent = network.parent or ""
        mtu_bytes, errors = endpoint_mtu(wanted, parent)
        if wanted.host_addresses:
            _plan_shim(wanted, parent, mtu_bytes, state)
        return NetworkPlan(
            mtu_bytes=mtu_bytes,
            uplink=parent,
            endpoint_link=LinkKind.MACVLAN,
            errors=errors,
        )


MACVLAN = MacvlanBackend()


def _plan_shim(wanted: NetworkInput, parent: str, mtu_bytes: int, state: KernelState) -> None:
    """The host's own macvlan, and a route through it to each endpoint of an IP version it has."""
    shim = shim_name(wanted.network)
    # As for a tunnel: no route_localnet, no link-local address of the kernel's making.
    settings = [
        setting
        for setting in link_sysctls(wanted.network.subnets, wanted.underlay, mtu_bytes, tunnel=True)
        if setting[1] != "forwarding"
    ]
    state.links[shim] = Link(
        LinkKind.MACVLAN,
        mtu_bytes,
        endpoint_mac(wanted.host_addresses[0]),
        # It is on the physical network, as the host's link is: without arp_ignore it would answer
        # for the host's other addresses, too, and with forwarding it would route for others.
        sysctls=(("ipv4", "arp_ignore", "1"), ("ipv4", "forwarding", "0"), *settings),
        parent=parent,
    )
    sources = {a.version: a.packed for a in wanted.host_addresses}
    # /32 and /128: any shorter, and the kernel would make a route to the whole CIDR through here.
    for address in wanted.host_addresses:
        state.addresses[AddressKey(shim, address.packed, address.max_prefixlen)] = True
    for endpoint in wanted.endpoints:
        for interface in endpoint.addresses:
            source = sources.get(interface.version)
            if source is not None:
                key = RouteKey(interface.ip.packed, interface.max_prefixlen)
                state.routes[key] = Route(0, source, Nexthop(shim, b""))
