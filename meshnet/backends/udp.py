"""``udp``: VXLAN's wire format in a process, where kernel or underlay does not carry VXLAN.

::

    endpoint eth0 ── mne… ┐
    endpoint eth0 ── mne… ┴ mnb<VNI> 10.42.1.1 ──(routing)── mnu<VNI> ── process ── UDP ── underlay

A separate process (`meshnet.vtep`) serves the TUN ``mnu<VNI>`` and outlives the agent.  One route
for each of the network's CIDRs leads there, and the process knows which host has which subnet: it
has one member for each remote host.  On the wire it is a VTEP like any other, so hosts that use it
and hosts with kernel VXLAN can share a network.

The routes name the device rather than a nexthop object: the kernel removes nexthop objects, with
their routes, from a device that loses its carrier, as a TUN does when its process ends
(docs/design/userspace-vtep.md).

Endpoints send super-packets no larger than what the process can pass on in one send
(`NetworkPlan.gso_max_bytes`).

With ``direct_routing`` a peer whose underlay address is on-link gets a nexthop on the underlay link
and is not a member.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from meshnet.backends import LinkNames, TunnelPorts
from meshnet.backends.routed_bridge import bridge_name, plan_bridge
from meshnet.backends.tunnel import (
    TunnelBackend,
    add_route,
    admit_members,
    direct_nexthop,
    is_of_other_version,
    is_self,
    others_cidrs,
    overlay_mtu,
    route_key,
    sources,
    vtep_link,
)
from meshnet.model import Datapath
from meshnet.modes import Mode
from meshnet.state import LinkKind, Member, MemberKey, Nexthop, Route
from meshnet.wire.mac import vtep_mac
from meshnet.wire.mtu import gso_max_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from meshnet.backends import NetworkInput, NetworkPlan, NexthopIds, Peer
    from meshnet.model import Host, HostId, IpNetwork, Network, Vni
    from meshnet.state import KernelState


def tun_name(network: Network) -> str:
    """Name of the TUN of the network's userspace VTEP; at most 11 characters."""
    return f"mnu{network.vni}"


def userspace_port(vni: Vni) -> int:
    """Default UDP port of a network's userspace VTEP, from 20000 to 29999.

    The kernel's VXLAN tells its networks apart by VNI, at one port.  A userspace VTEP serves a
    single network and cannot share its port.
    """
    return 20000 + vni % 10000


def plan_tun(wanted: NetworkInput, mtu_bytes: int, port: int, state: KernelState) -> None:
    """Add to `state` the TUN, served by a process at a UDP port."""
    state.links[tun_name(wanted.network)] = vtep_link(wanted, LinkKind.TUN, mtu_bytes, port)


def plan_member(
    wanted: NetworkInput,
    peer: Peer,
    subnets: Iterable[IpNetwork],
    port: int,
    *,
    offload: bool,
    state: KernelState,
) -> str | None:
    """Add a peer to the members; returns why it cannot be one, or None.

    Of two peers at one underlay address the first becomes a member.  Peers come in the order of
    their hosts' names, so it is the same one in every pass.
    """
    host = peer.host
    key = MemberKey(tun_name(wanted.network), host.underlay_ip.packed)
    if problem := is_of_other_version(host, wanted.underlay):
        return problem
    if key in state.members:
        return (
            f"host {host.id} has another host's underlay address {host.underlay_ip}: "
            "remove the one that is gone (meshnet host rm)"
        )
    behind = tuple((s.network_address.packed, s.prefixlen) for s in subnets)
    state.members[key] = Member(vtep_mac(peer.subnets[0]), behind, port, offload)
    return None


def by_name(peers: Iterable[Peer]) -> list[Peer]:
    """Peers in the order of their hosts' names: see `plan_member` for why that matters."""
    return sorted(peers, key=lambda peer: peer.host.id)


class UdpBackend(TunnelBackend):
    """The mode (see `meshnet.backends.Backend`); also carries ``vxlan`` where the kernel cannot."""

    mode = Mode.UDP

    def link_names(self, network: Network) -> LinkNames:
        """Bridge and TUN."""
        return LinkNames(local=(bridge_name(network),), tunnels=(tun_name(network),))

    def default_port(self, vni: Vni) -> int:
        """A port that follows from the VNI, so that networks seldom meet."""
        return userspace_port(vni)

    def ports(self, network: Network, *, kernel_vxlan: bool) -> TunnelPorts:
        """The process's."""
        return TunnelPorts(exclusive=frozenset({network.port}))

    def userspace_vtep(self, network: Network) -> str | None:
        """It always has one."""
        return tun_name(network)

    def datapath_of(self, host: Host) -> Datapath | None:
        """Always the process, even if the host's kernel has VXLAN."""
        return Datapath.USERSPACE

    def plan_host(self, wanted: NetworkInput, state: KernelState) -> NetworkPlan:
        """Bridge, gateway addresses, TUN and its process, and the routes to it."""
        network = wanted.network
        dev = tun_name(network)
        mtu_bytes, errors = overlay_mtu(wanted)
        plan = plan_bridge(wanted, mtu_bytes, {dev: network.port}, state)
        plan_tun(wanted, mtu_bytes, network.port, state)
        by_version = sources(wanted)
        for cidr in others_cidrs(wanted):
            # No ``unreachable`` route as with VXLAN: the process answers for subnets without owner.
            source = by_version[cidr.version]
            state.routes[route_key(cidr)] = Route(0, source, Nexthop(dev, b""))
        return replace(plan, gso_max_bytes=gso_max_bytes(mtu_bytes), errors=errors)

    def plan_peers(
        self, wanted: NetworkInput, peers: Sequence[Peer], state: KernelState, ids: NexthopIds
    ) -> dict[HostId, str]:
        """A member for each peer, or its nexthops on the underlay."""
        network, underlay = wanted.network, wanted.underlay
        by_version = sources(wanted)
        errors: dict[HostId, str] = {}
        admit_members(peers, underlay, state)
        for peer in by_name(peers):
            host = peer.host
            if problem := is_self(host, underlay):
                errors[host.id] = problem
                continue
            behind = []
            for subnet in peer.subnets:
                if subnet.version not in by_version:
                    continue
                direct = network.direct_routing and direct_nexthop(host, subnet, underlay)
                if direct:
                    add_route(state, ids, underlay, subnet, direct, by_version[subnet.version])
                else:
                    behind.append(subnet)
            if not behind:
                continue
            # Only userspace VTEPs accept unfinished checksums.
            offload = network.mode is self.mode or host.datapath is Datapath.USERSPACE
            problem = plan_member(wanted, peer, behind, network.port, offload=offload, state=state)
            if problem is not None:
                errors[host.id] = problem
            elif wanted.hosts_inside:
                # Then there is no route for the whole CIDR (`others_cidrs`).
                for subnet in behind:
                    route = Route(0, by_version[subnet.version], Nexthop(tun_name(network), b""))
                    state.routes[route_key(subnet)] = route
        return errors


UDP = UdpBackend()
