"""``udp``: VXLAN's wire format by a process, for hosts and underlays without the kernel's.

::

    endpoint eth0 ── mne… ┐
    endpoint eth0 ── mne… ┴ mnb<VNI> 10.42.1.1 ──(routing)── mnu<VNI> ── process ── UDP ── underlay

The TUN ``mnu<VNI>`` is served by a process of its own (`meshnet.vtep`), which outlives the agent.
One route for each of the network's CIDRs leads there, and the process knows which host has which
subnet: for each remote host it has one member.  On the wire it is a VTEP like any other, so a host
that uses it and hosts with kernel VXLAN share one network.

The routes name the device and no nexthop object: the kernel removes those from a device that loses
its carrier, as a TUN does when its process ends (docs/design/userspace-vtep.md).

Endpoints are told to send super-packets of a size that is one send of the process
(`NetworkPlan.gso_max_bytes`).

With ``direct_routing`` a peer whose underlay address is on-link gets a nexthop on the underlay link
and is no member.
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
from meshnet.model import Datapath, Mode
from meshnet.state import LinkKind, Member, MemberKey, Nexthop, Route
from meshnet.wire.mac import vtep_mac
from meshnet.wire.mtu import gso_max_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from meshnet.backends import NetworkInput, NetworkPlan, NexthopIds, Peer
    from meshnet.model import HostId, IpNetwork, Network
    from meshnet.state import KernelState


def tun_name(network: Network) -> str:
    """Name of the TUN of the network's userspace VTEP; at most 11 characters."""
    return f"mnu{network.vni}"


def plan_tun(wanted: NetworkInput, mtu_bytes: int, port: int, state: KernelState) -> None:
    """Add the TUN, served by a process at a UDP port, to `state`."""
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
    """Add a peer to the members; returns why it cannot be one.

    Of two at one underlay address the first is: peers come in the order of their names, so that it
    is the same one in every pass.
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
    """Peers in the order of their hosts' names."""
    return sorted(peers, key=lambda peer: peer.host.id)


class UdpBackend:
    """The mode (see `meshnet.backends.Backend`); also for ``vxlan`` where the kernel has none."""

    def plan_host(self, wanted: NetworkInput, state: KernelState) -> NetworkPlan:
        """Bridge, gateway addresses, TUN and its process, and the routes there."""
        network = wanted.network
        dev = tun_name(network)
        plan = plan_bridge(wanted, dev, state)
        plan_tun(wanted, plan.mtu_bytes, network.port, state)
        by_version = sources(wanted)
        for cidr in others_cidrs(wanted):
            # The process answers "unreachable" for what nobody owns.
            source = by_version[cidr.version]
            state.routes[route_key(cidr)] = Route(0, source, Nexthop(dev, b""))
        return replace(plan, gso_max_bytes=gso_max_bytes(plan.mtu_bytes))

    def plan_peers(
        self, wanted: NetworkInput, peers: Iterable[Peer], state: KernelState, ids: NexthopIds
    ) -> dict[HostId, str]:
        """A member for each peer, or its nexthops on the underlay."""
        network, underlay = wanted.network, wanted.underlay
        by_version = sources(wanted)
        errors: dict[HostId, str] = {}
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
                    set_way(state, ids, underlay, subnet, direct, by_version[subnet.version])
                else:
                    behind.append(subnet)
            if not behind:
                continue
            offload = network.mode is Mode.UDP or host.datapath is Datapath.USERSPACE
            problem = plan_member(wanted, peer, behind, network.port, offload=offload, state=state)
            if problem is not None:
                errors[host.id] = problem
        return errors


UDP = UdpBackend()
