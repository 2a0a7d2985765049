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

With ``fallback`` a userspace VTEP (`meshnet.backends.udp`) is beside the device, at a port of its
own, and every peer is a member of it, so that it is heard whichever way it sends.  Routes lead to
the TUN only for peers in fallback; their neighbours and FDB entries stay, since VXLAN goes on being
probed (docs/design/fallback.md).

RFC 7348; linux/if_link.h, linux/nexthop.h, linux/neighbour.h.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from meshnet.backends.overlay import (
    direct_nexthop,
    is_of_other_version,
    is_self,
    others_cidrs,
    plan_bridge,
    route_key,
    set_way,
    sources,
    vtep_link,
)
from meshnet.backends.udp import by_name, plan_member, plan_tun, tun_name
from meshnet.model import Datapath
from meshnet.state import FdbKey, LinkKind, NeighbourKey, Nexthop, Route
from meshnet.wire.mac import link_local_of, vtep_mac

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet.backends import NetworkInput, NetworkPlan, NexthopIds, Peer, Underlay
    from meshnet.model import Host, HostId, IpNetwork, Network
    from meshnet.state import KernelState


def vxlan_name(network: Network) -> str:
    """Name of the network's VXLAN device; at most 11 characters."""
    return f"mnv{network.vni}"


class VxlanBackend:
    """The mode (see `meshnet.backends.Backend`)."""

    def plan_host(self, wanted: NetworkInput, state: KernelState) -> NetworkPlan:
        """Bridge, VXLAN device, gateway addresses, and a stop for packets to nobody."""
        network = wanted.network
        dev = vxlan_name(network)
        plan = plan_bridge(wanted, dev, state)
        state.links[dev] = vtep_link(wanted, LinkKind.VXLAN, plan.mtu_bytes, network.port)
        for cidr in others_cidrs(wanted):
            # Else packets to a subnet nobody owns would leave by the host's default route.
            state.routes[route_key(cidr)] = Route(0)
        if network.fallback:
            plan_tun(wanted, plan.mtu_bytes, network.fallback_port, state)
            firewall = plan.firewall._replace(
                links=(*plan.firewall.links, tun_name(network)),
                ports=(*plan.firewall.ports, network.fallback_port),
            )
            plan = replace(plan, firewall=firewall)
        return plan

    def plan_peers(
        self, wanted: NetworkInput, peers: Iterable[Peer], state: KernelState, ids: NexthopIds
    ) -> dict[HostId, str]:
        """Nexthop, route, neighbour and FDB entry of each peer, and its part in the fallback."""
        network, underlay = wanted.network, wanted.underlay
        direct = network.direct_routing
        dev, tun = vxlan_name(network), Nexthop(tun_name(network), b"")
        by_version = sources(wanted)
        errors: dict[HostId, str] = {}
        for peer in by_name(peers) if network.fallback else peers:
            host = peer.host
            if problem := is_self(host, underlay):
                errors[host.id] = problem
                continue
            fallen = False
            behind = [s for s in peer.subnets if s.version in by_version]
            if behind and has_fallback(network, host, underlay):
                port = network.fallback_port
                problem = plan_member(wanted, peer, behind, port, offload=True, state=state)
                if problem is not None:
                    errors[host.id] = problem
                else:
                    fallen = host.id in wanted.fallen
            for subnet in peer.subnets:
                source = by_version.get(subnet.version)
                if source is None:
                    continue
                nexthop = direct_nexthop(host, subnet, underlay) if direct else None
                if nexthop is None and (problem := is_of_other_version(host, underlay)):
                    errors[host.id] = problem
                    continue
                if nexthop is None:
                    nexthop = _plan_tunnel(dev, peer, subnet, state)
                    if fallen:
                        state.routes[route_key(subnet)] = Route(0, source, tun)
                        continue
                set_way(state, ids, underlay, subnet, nexthop, source)
        return errors


VXLAN = VxlanBackend()


def has_fallback(network: Network, host: Host, underlay: Underlay) -> bool:
    """Whether a peer can be sent to by the fallback.

    One that has a userspace VTEP only cannot: that one listens at VXLAN's port.
    """
    return (
        network.fallback
        and host.datapath is Datapath.KERNEL
        and host.underlay_ip.version == underlay.ip.version
    )


def _plan_tunnel(dev: str, peer: Peer, subnet: IpNetwork, state: KernelState) -> Nexthop:
    mac = vtep_mac(peer.subnets[0])
    gateway = subnet.network_address.packed if subnet.version == 4 else link_local_of(mac)
    state.neighbours[NeighbourKey(dev, gateway)] = mac
    state.fdb[FdbKey(dev, mac)] = peer.host.underlay_ip.packed
    return Nexthop(dev, gateway)
