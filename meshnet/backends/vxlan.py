"""``vxlan``: one VXLAN device and one bridge for each network, one route for each remote host.

::

    endpoint eth0 ── mne… ┐
    endpoint eth0 ── mne… ┴ mnb<VNI> 10.42.1.1 ──(routing)── mnv<VNI> ── UDP ── underlay

The cost in kernel objects, for each remote host and IP version: one nexthop object, one route
through it, one permanent neighbour; and for each host one FDB entry.  Endpoints of other hosts cost
nothing here: state grows with hosts, not with containers.  Nothing is learned from packets.

The gateway that stands for a remote VTEP is, for IPv4, its subnet's own address (10.42.3.0, which
no endpoint can have), and for IPv6 the link-local address made from its MAC.  The kernel refuses
a global IPv6 gateway where a route over another link covers it, even an on-link one; it never looks
up a link-local one (``ip6_validate_gw`` in net/ipv6/route.c, docs/design/ipv6-gateways.md).

With ``direct_routing`` a peer whose underlay address is on-link gets a nexthop on the underlay link
and no tunnel objects.

With ``fallback`` a userspace VTEP (`meshnet.backends.udp`) works beside the device, at another
port.  Every peer is a member of it, and so is heard whichever way it sends.  Routes lead to the TUN
only for peers in fallback; these keep their neighbours and FDB entries, since VXLAN to them is
still probed (docs/design/fallback.md).

RFC 7348; linux/if_link.h, linux/nexthop.h, linux/neighbour.h.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from meshnet.backends import LinkNames, Setting, TunnelPorts
from meshnet.backends.routed_bridge import bridge_name, plan_bridge
from meshnet.backends.tunnel import (
    TunnelBackend,
    add_route,
    admit_members,
    direct_nexthop,
    is_direct,
    is_of_other_version,
    is_self,
    others_cidrs,
    overlay_mtu,
    route_key,
    sources,
    vtep_link,
)
from meshnet.backends.udp import UDP, by_name, plan_member, plan_tun, tun_name, userspace_port
from meshnet.errors import UsageError
from meshnet.model import Datapath
from meshnet.modes import Mode
from meshnet.state import FdbKey, LinkKind, NeighbourKey, Nexthop, Route
from meshnet.wire.mac import link_local_of, vtep_mac

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.backends import Backend, NetworkInput, NetworkPlan, NexthopIds, Peer, Underlay
    from meshnet.model import Host, HostId, IpNetwork, Network
    from meshnet.state import KernelState


def vxlan_name(network: Network) -> str:
    """Name of the network's VXLAN device; at most 11 characters."""
    return f"mnv{network.vni}"


class VxlanBackend(TunnelBackend):
    """The mode (see `meshnet.backends.Backend`)."""

    mode = Mode.VXLAN
    settings = TunnelBackend.settings | {Setting.FALLBACK}

    def check(self, network: Network) -> None:
        """Refuse a network whose port is also its fallback's."""
        if network.fallback and network.port == userspace_port(network.vni):
            raise UsageError(
                f"port {network.port} is the fallback's port of VNI {network.vni}: choose another"
            )

    def on(self, underlay: Underlay) -> Backend:
        """A userspace VTEP where the kernel has no VXLAN."""
        return self if underlay.kernel_vxlan else UDP

    def link_names(self, network: Network) -> LinkNames:
        """Bridge, VXLAN device, and the TUN that is beside it or in its place."""
        tunnels = (vxlan_name(network), tun_name(network))
        return LinkNames(local=(bridge_name(network),), tunnels=tunnels)

    def ports(self, network: Network, *, kernel_vxlan: bool) -> TunnelPorts:
        """The VXLAN device's port, and the fallback's."""
        if not kernel_vxlan:
            return UDP.ports(network, kernel_vxlan=kernel_vxlan)
        fallback = {userspace_port(network.vni)} if network.fallback else ()
        return TunnelPorts(exclusive=frozenset(fallback), shared=frozenset({network.port}))

    def option_of_port(self, network: Network, port: int) -> str:
        """The fallback's port follows from the VNI."""
        is_fallback = network.fallback and port == userspace_port(network.vni)
        return "--vni" if is_fallback else Setting.PORT

    def userspace_vtep(self, network: Network) -> str | None:
        """The fallback's."""
        return tun_name(network) if network.fallback else None

    def datapath_of(self, host: Host) -> Datapath | None:
        """What the host publishes: not every kernel has VXLAN."""
        return host.datapath

    def path_to(self, network: Network, peer: Peer, underlay: Underlay, *, fallen: bool) -> str:
        """The path of any tunnel, or the fallback's."""
        if fallen:
            return UDP.path_to(network, peer, underlay, fallen=fallen)
        return super().path_to(network, peer, underlay, fallen=fallen)

    def may_fall(self, network: Network, peer: Peer, underlay: Underlay) -> bool:
        """A peer that this host sends to by VXLAN, and that has the fallback, too."""
        return (
            peer.host.underlay_ip != underlay.ip
            and _has_fallback(network, peer.host, underlay)
            and not is_direct(network, peer, underlay)
        )

    def plan_host(self, wanted: NetworkInput, state: KernelState) -> NetworkPlan:
        """Bridge, VXLAN device, gateway addresses, and a route that stops packets to nobody."""
        network = wanted.network
        dev, tun = vxlan_name(network), tun_name(network)
        tunnels = {dev: network.port}
        if network.fallback:
            tunnels[tun] = userspace_port(network.vni)
        mtu_bytes, errors = overlay_mtu(wanted)
        plan = plan_bridge(wanted, mtu_bytes, tunnels, state)
        state.links[dev] = vtep_link(wanted, LinkKind.VXLAN, mtu_bytes, network.port)
        for cidr in others_cidrs(wanted):
            # Otherwise packets to a subnet that nobody owns would leave by the host's default
            # route, with container addresses (docs/design/unreachable-route.md).
            state.routes[route_key(cidr)] = Route(0)
        if network.fallback:
            plan_tun(wanted, mtu_bytes, tunnels[tun], state)
        return replace(plan, errors=errors)

    def plan_peers(
        self, wanted: NetworkInput, peers: Sequence[Peer], state: KernelState, ids: NexthopIds
    ) -> dict[HostId, str]:
        """Nexthop, route, neighbour and FDB entry for each peer, and its part in the fallback."""
        network, underlay = wanted.network, wanted.underlay
        direct = network.direct_routing
        dev, tun = vxlan_name(network), Nexthop(tun_name(network), b"")
        by_version = sources(wanted)
        errors: dict[HostId, str] = {}
        admit_members(peers, underlay, state)
        for peer in by_name(peers) if network.fallback else peers:
            host = peer.host
            if problem := is_self(host, underlay):
                errors[host.id] = problem
                continue
            fallen = False
            behind = [s for s in peer.subnets if s.version in by_version]
            if behind and _has_fallback(network, host, underlay):
                port = userspace_port(network.vni)
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
                        # By the device, not a nexthop object, which a TUN would lose (`udp`).
                        state.routes[route_key(subnet)] = Route(0, source, tun)
                        continue
                add_route(state, ids, underlay, subnet, nexthop, source)
        return errors


VXLAN = VxlanBackend()


def _has_fallback(network: Network, host: Host, underlay: Underlay) -> bool:
    """Whether a peer can be reached by the fallback.

    A peer without kernel VXLAN cannot: its one userspace VTEP listens at VXLAN's port.
    """
    return (
        network.fallback
        and host.datapath is Datapath.KERNEL
        and host.underlay_ip.version == underlay.ip.version
    )


def _plan_tunnel(dev: str, peer: Peer, subnet: IpNetwork, state: KernelState) -> Nexthop:
    # The MAC follows from the reservation: nothing has to be published for it.
    mac = vtep_mac(peer.subnets[0])
    gateway = subnet.network_address.packed if subnet.version == 4 else link_local_of(mac)
    state.neighbours[NeighbourKey(dev, gateway)] = mac
    state.fdb[FdbKey(dev, mac)] = peer.host.underlay_ip.packed
    return Nexthop(dev, gateway)
