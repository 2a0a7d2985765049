"""The domain: networks, hosts, subnets, endpoints, and the snapshot of a mesh.

Values only: what the agents agree on through the store (see `meshnet.codec` for its JSON) and what
one agent knows of itself.  Terms are those of docs/architecture.md.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from typing import TYPE_CHECKING, NewType

if TYPE_CHECKING:
    from collections.abc import Mapping

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network
IpInterface = IPv4Interface | IPv6Interface

HostId = NewType("HostId", str)
NetworkName = NewType("NetworkName", str)
EndpointId = NewType("EndpointId", str)
"""Twelve hexadecimal digits; part of the host-side link's name."""
Vni = NewType("Vni", int)
"""VXLAN network identifier, 1 to 2^24 - 1 (RFC 7348 §5)."""

VXLAN_PORT = 4789
"""UDP port of VXLAN (RFC 7348 §8.1)."""


class Mode(StrEnum):
    """How a network carries its packets."""

    VXLAN = "vxlan"
    UDP = "udp"
    MACVLAN = "macvlan"
    UNDERLAY_BRIDGE = "underlay-bridge"
    BRIDGE = "bridge"


class Datapath(StrEnum):
    """What forwards a host's overlay packets."""

    KERNEL = "kernel"
    USERSPACE = "userspace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A named container network.

    Attributes:
        subnets: its CIDRs, at most one a family, IPv4 first.
        host_prefix: prefix length of one host's IPv4 subnet.
        host_prefix6: prefix length of one host's IPv6 subnet.
        port: UDP destination port of the tunnel.
        mtu_bytes: MTU of endpoints; None: the underlay's less the encapsulation's overhead.
        direct_routing: reach on-link peers by a plain route, without encapsulation.
    """

    name: NetworkName
    mode: Mode
    subnets: tuple[IpNetwork, ...]
    vni: Vni
    port: int = VXLAN_PORT
    host_prefix: int = 24
    host_prefix6: int = 64
    mtu_bytes: int | None = None
    direct_routing: bool = False

    def host_prefix_of(self, version: int) -> int:
        """Prefix length of one host's subnet of the IP version (4 or 6)."""
        return self.host_prefix if version == 4 else self.host_prefix6

    def is_host_subnet(self, subnet: IpNetwork) -> bool:
        """Whether `subnet` is one of those that the network's CIDRs are cut into."""
        return subnet.prefixlen == self.host_prefix_of(subnet.version) and any(
            subnet.version == cidr.version and subnet.subnet_of(cidr)  # type: ignore[arg-type]
            for cidr in self.subnets
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a host publishes of itself; it outlives the host's lease."""

    id: HostId
    underlay_ip: IpAddress
    datapath: Datapath = Datapath.KERNEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """`host` owns `subnet` of `network`, until it is removed on purpose."""

    network: NetworkName
    subnet: IpNetwork
    host: HostId


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Who runs as a host id right now: the value of the key under the host's lease.

    Attributes:
        instance: random name of the agent's state directory; a restarted agent keeps it.
        underlay_ip: where that agent is, for the message to a second one.
    """

    instance: str
    underlay_ip: IpAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One attachment of one network namespace to one network.

    Attributes:
        addresses: its addresses with the host subnet's prefix length, IPv4 first.
        default_route: whether the namespace's default route leads through it.
        netns_inode: inode of the namespace in nsfs, to find its other processes by.
        pid_start_ticks: start time of `pid` (field 22 of /proc/PID/stat): pids are reused.
    """

    id: EndpointId
    network: NetworkName
    host: HostId
    name: str
    pid: int
    ifname: str
    addresses: tuple[IpInterface, ...]
    gateways: tuple[IpAddress, ...]
    mac: bytes
    mtu_bytes: int
    default_route: bool
    netns_inode: int
    pid_start_ticks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BadValue:
    """A key of the store whose value was refused, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshSnapshot:
    """All that the store says of the mesh, as of one revision.

    Attributes:
        reservations: by network, who owns each subnet.
        alive: hosts whose lease has not run out.
        bad_values: keys that were skipped because their value is unusable.
        holes: those of them of which not even an earlier value is known: what they stand for may
            exist, so nothing may be deleted for not being in the snapshot.
    """

    revision: int = 0
    networks: Mapping[NetworkName, Network] = field(default_factory=dict)
    hosts: Mapping[HostId, Host] = field(default_factory=dict)
    alive: Mapping[HostId, Claim] = field(default_factory=dict)
    reservations: Mapping[NetworkName, Mapping[IpNetwork, HostId]] = field(default_factory=dict)
    bad_values: Mapping[str, str] = field(default_factory=dict)
    holes: frozenset[str] = frozenset()

    def subnets_of(self, host: HostId, network: NetworkName) -> tuple[IpNetwork, ...]:
        """The subnets `host` owns in `network`, IPv4 first; what cannot be one is left out."""
        known = self.networks.get(network)
        owned = [
            subnet
            for subnet, owner in self.reservations.get(network, {}).items()
            if owner == host and known is not None and known.is_host_subnet(subnet)
        ]
        return tuple(sorted(owned, key=lambda s: (s.version, int(s.network_address))))
