"""The domain: networks, hosts, subnets, endpoints, and the snapshot of a mesh.

Values only: what the agents agree on through the store (see `meshnet.codec` for its JSON) and what
one agent knows of itself.  docs/architecture.md explains the terms.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
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
from typing import TYPE_CHECKING, NamedTuple, NewType

if TYPE_CHECKING:
    from collections.abc import Iterator, KeysView
    from typing import Self

    from meshnet.modes import Mode
    from meshnet.sandbox import Sandbox

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
DEFAULT_HOST_PREFIX = 24
"""Prefix length of one host's IPv4 subnet."""
DEFAULT_HOST_PREFIX6 = 64
"""Prefix length of one host's IPv6 subnet."""


class Datapath(StrEnum):
    """What forwards a host's overlay packets."""

    KERNEL = "kernel"
    USERSPACE = "userspace"


class AddressRange(NamedTuple):
    """Addresses of one IP version from the first to the last, both included."""

    first: IpAddress
    last: IpAddress

    @property
    def version(self) -> int:
        """IP version: 4 or 6."""
        return self.first.version

    def __contains__(self, address: object) -> bool:
        if not isinstance(address, IPv4Address | IPv6Address) or address.version != self.version:
            return False
        return int(self.first) <= int(address) <= int(self.last)

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A named container network.

    Attributes:
        subnets: its CIDRs, at most one for each IP version, IPv4 first.
        host_prefix: prefix length of one host's IPv4 subnet.
        host_prefix6: prefix length of one host's IPv6 subnet.
        port: UDP destination port of the tunnel.
        mtu_bytes: MTU of endpoints; None: the underlay's less the encapsulation's overhead.
        direct_routing: reach on-link peers by a plain route, without encapsulation.
        fallback: packets to peers that VXLAN does not reach go through the userspace VTEP, which
            listens at a different port (`meshnet.backends.udp.userspace_port`).
        parent: each host's link on the physical network, if endpoints are on that network.
        ranges: pools for the addresses of endpoints on the physical network, at most one for each
            IP version; an IP version without a range uses its whole CIDR.
        gateways: routers of the physical network, at most one for each IP version.
        internal: endpoints cannot reach anything outside the network.
        host_access: a host reaches its own endpoints, in a mode that would not let it.
    """

    name: NetworkName
    mode: Mode
    subnets: tuple[IpNetwork, ...]
    vni: Vni
    port: int = VXLAN_PORT
    host_prefix: int = DEFAULT_HOST_PREFIX
    host_prefix6: int = DEFAULT_HOST_PREFIX6
    mtu_bytes: int | None = None
    direct_routing: bool = False
    fallback: bool = False
    parent: str | None = None
    ranges: tuple[AddressRange, ...] = ()
    gateways: tuple[IpAddress, ...] = ()
    internal: bool = False
    host_access: bool = False

    def host_prefix_of(self, version: int) -> int:
        """Prefix length of one host's subnet of the IP version (4 or 6)."""
        return self.host_prefix if version == 4 else self.host_prefix6

    def is_host_subnet(self, subnet: IpNetwork) -> bool:
        """Whether `subnet` is one of those that the network's CIDRs are cut into."""
        if subnet.prefixlen != self.host_prefix_of(subnet.version):
            return False
        # Not `subnet_of`, which takes ten times as long: a pass calls this for every peer.
        version, first = subnet.version, int(subnet.network_address)
        for cidr in self.subnets:
            if cidr.version == version:
                return first & int(cidr.netmask) == int(cidr.network_address)
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a host publishes about itself; the entry outlives the host's lease."""

    id: HostId
    underlay_ip: IpAddress
    datapath: Datapath = Datapath.KERNEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """`host` owns `subnet` of `network`, until somebody removes the reservation on purpose."""

    network: NetworkName
    subnet: IpNetwork
    host: HostId


def _by_address(subnet: IpNetwork) -> tuple[int, int]:
    return subnet.version, int(subnet.network_address)


class Reservations(Mapping[IpNetwork, HostId]):
    """The owners of one network's subnets, looked up by host or by subnet in constant time."""

    __slots__ = ("_owners", "_subnets")

    def __init__(self, owners: Mapping[IpNetwork, HostId] | None = None) -> None:
        self._owners: dict[IpNetwork, HostId] = {}
        self._subnets: dict[HostId, tuple[IpNetwork, ...]] = {}
        for subnet, host in (owners or {}).items():
            self.put(subnet, host)

    def __getitem__(self, subnet: IpNetwork) -> HostId:
        return self._owners[subnet]

    def __iter__(self) -> Iterator[IpNetwork]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    @property
    def hosts(self) -> KeysView[HostId]:
        """The hosts that own a subnet."""
        return self._subnets.keys()

    def of(self, host: HostId) -> tuple[IpNetwork, ...]:
        """The subnets of a host, IPv4 first."""
        return self._subnets.get(host, ())

    def put(self, subnet: IpNetwork, host: HostId) -> HostId | None:
        """Give a subnet to a host; returns the owner before."""
        before = self._owners.get(subnet)
        if before != host:
            if before is not None:
                self.remove(subnet)
            self._owners[subnet] = host
            owned = self._subnets.get(host, ())
            # Inserted rather than sorted again: one host may own all of a large network.
            at = bisect(owned, _by_address(subnet), key=_by_address)
            self._subnets[host] = (*owned[:at], subnet, *owned[at:])
        return before

    def remove(self, subnet: IpNetwork) -> HostId | None:
        """Free a subnet; returns the owner before."""
        host = self._owners.pop(subnet, None)
        if host is not None:
            left = tuple(s for s in self._subnets[host] if s != subnet)
            if left:
                self._subnets[host] = left
            else:
                del self._subnets[host]
        return host

    def assign(self, host: HostId, subnets: tuple[IpNetwork, ...]) -> None:
        """Make `subnets` the only ones that a host owns, whoever owned them before."""
        for subnet in self.of(host):
            if subnet not in subnets:
                self.remove(subnet)
        for subnet in subnets:
            self.put(subnet, host)

    def copy(self) -> Self:
        """A copy that shares no table with this one."""
        made = type(self)()
        made._owners = dict(self._owners)
        made._subnets = dict(self._subnets)
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The agent that runs as a host id right now: the value of the key under the host's lease.

    Attributes:
        instance: random name of the agent's state directory; a restarted agent keeps it.
        underlay_ip: that agent's: tells it from an agent on a copy of its state directory.
    """

    instance: str
    underlay_ip: IpAddress


class AddressHolder(NamedTuple):
    """The holder of an address of an underlay network's pool.

    Attributes:
        host: the host that took it; "": a machine outside the mesh.
        endpoint: that host's endpoint; "": the host itself, or a machine outside the mesh.
        held_by: MAC of the machine outside the mesh that answered for it; b"": none did.
    """

    host: HostId
    endpoint: str = ""
    held_by: bytes = b""


class Protocol(StrEnum):
    """A transport protocol whose ports can be published."""

    TCP = "tcp"
    UDP = "udp"


class PublishedPort(NamedTuple):
    """A port of the host that leads to one of an endpoint.

    Attributes:
        host_ip: address of the host that it is published at; None: all of them.
    """

    protocol: Protocol
    host_port: int
    port: int
    host_ip: IpAddress | None = None

    def __str__(self) -> str:
        at = "" if self.host_ip is None else f"{self.host_ip}:"
        if self.host_ip is not None and self.host_ip.version == 6:
            at = f"[{self.host_ip}]:"
        return f"{at}{self.host_port}:{self.port}/{self.protocol}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One attachment of one network namespace to one network.

    Attributes:
        addresses: its addresses with their on-link prefix lengths, IPv4 first.
        gateways: at most one for each address, IPv4 first.
        default_route: whether the namespace's default route is to lead through it, for each IP
            version of which the namespace has no other.
        default_versions: the IP versions for which it does.
        published: ports of its host that lead to it.
        parent: the host's link that its macvlan is on; None: its link is one end of a veth pair.
    """

    id: EndpointId
    network: NetworkName
    host: HostId
    name: str
    sandbox: Sandbox
    ifname: str
    addresses: tuple[IpInterface, ...]
    gateways: tuple[IpAddress, ...]
    mac: bytes
    mtu_bytes: int
    default_route: bool
    default_versions: tuple[int, ...] = ()
    published: tuple[PublishedPort, ...] = ()
    parent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshSnapshot:
    """All that the store says of the mesh, as of one revision.

    Attributes:
        reservations: by network, who owns each subnet.
        alive: hosts whose lease has not run out.
        bad_values: keys that were skipped because their value is unusable, and why.
        holes: those of them without a known earlier value.  What they stand for may exist, so
            nothing may be deleted merely because it is missing from the snapshot.
    """

    revision: int = 0
    networks: Mapping[NetworkName, Network] = field(default_factory=dict)
    hosts: Mapping[HostId, Host] = field(default_factory=dict)
    alive: Mapping[HostId, Claim] = field(default_factory=dict)
    reservations: Mapping[NetworkName, Reservations] = field(default_factory=dict)
    bad_values: Mapping[str, str] = field(default_factory=dict)
    holes: frozenset[str] = frozenset()

    def subnets_of(self, host: HostId, network: NetworkName) -> tuple[IpNetwork, ...]:
        """The subnets `host` owns in `network`, IPv4 first, without any that do not fit it."""
        known = self.networks.get(network)
        reservations = self.reservations.get(network)
        if known is None or reservations is None:
            return ()
        return tuple(s for s in reservations.of(host) if known.is_host_subnet(s))

    def reserved_by(self, host: HostId) -> dict[NetworkName, tuple[IpNetwork, ...]]:
        """All subnets that a host owns, by network."""
        owned = {name: held.of(host) for name, held in self.reservations.items()}
        return {name: subnets for name, subnets in owned.items() if subnets}
