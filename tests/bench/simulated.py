"""A mesh of thousands of hosts that exist in etcd alone, for one real agent to follow.

Every host has the keys that a real one has (``hosts/``, ``alive/``, ``subnets/``), through the real
codec.  What a real agent's kernel must hold for it is `SimulatedHost.objects`, from the formulas of
docs/architecture.md and not from `meshnet.plan`: it is what the plan is checked against.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, NamedTuple

from meshnet.codec.hosts import encode_claim, encode_host, encode_reservation
from meshnet.codec.networks import check_network, encode_network
from meshnet.model import Claim, Host, HostId, Network, NetworkName, Reservation, Vni
from meshnet.modes import Mode
from meshnet.store.mirror import alive_key, host_key, network_key, subnet_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from meshnet.model import IpAddress, IpNetwork
    from tests.bench.gateway import Gateway, Write

NAME = NetworkName("prod")
VNI = 4097
TUNNEL = f"mnv{VNI}"
OVERLAY = IPv4Network("10.0.0.0/9")
OVERLAY6 = IPv6Network("fd00:42::/32")
UNDERLAY = IPv4Network("172.16.0.0/12")
"""Behind the lab's gateway, so that no host of the lab has an address of it."""
FIRST_SUBNET = 256
"""The subnets before it are for real agents, which take the lowest free one."""


class Object(NamedTuple):
    """A kernel object by what identifies it; all addresses are packed.

    Attributes:
        kind: ``route``, ``nexthop``, ``neighbour`` or ``fdb``.
        key: a route's prefix, a nexthop's gateway, a neighbour's address, an FDB entry's MAC.
    """

    kind: str
    key: bytes


class SimulatedHost(NamedTuple):
    """A host that nobody runs.

    Attributes:
        number: names it.
        subnet: number of its subnet, from 0, of each IP version.
        underlay_ip: where its VTEP would be.
    """

    number: int
    subnet: int
    underlay_ip: IpAddress

    @property
    def id(self) -> HostId:
        """Its host id."""
        return HostId(f"sim{self.number}")


class Addressing(NamedTuple):
    """What a subnet's number stands for: the formulas of docs/architecture.md."""

    subnet: IpNetwork
    gateway: bytes
    mac: bytes

    def objects(self) -> frozenset[Object]:
        """Keys of the objects another host's kernel holds for it."""
        return frozenset(
            (
                Object("route", self.subnet.network_address.packed),
                Object("nexthop", self.gateway),
                Object("neighbour", self.gateway),
                Object("fdb", self.mac),
            )
        )


def addressing(number: int, *, dual_stack: bool = False) -> tuple[Addressing, ...]:
    """What a host with that subnet number has, IPv4 first.

    The VTEP's MAC is 02:6d and the IPv4 subnet's address; an IPv4 gateway is that address, an IPv6
    one the link-local address (modified EUI-64) of the MAC.
    """
    four = IPv4Network((int(OVERLAY.network_address) + (number << 8), 24))
    mac = b"\x02m" + four.network_address.packed
    found = [Addressing(four, four.network_address.packed, mac)]
    if dual_stack:
        six = IPv6Network((int(OVERLAY6.network_address) + (number << 64), 64))
        link_local = bytes.fromhex("fe80000000000000") + b"\x00m" + mac[2:3] + b"\xff\xfe" + mac[3:]
        found.append(Addressing(six, link_local, mac))
    return tuple(found)


def underlay_ip(number: int) -> IpAddress:
    """The underlay address with that number; different numbers, different addresses."""
    return UNDERLAY[256 + number]


class SimulatedMesh:
    """The hosts that etcd has, and how to change them.  Every change is one transaction a host.

    Attributes:
        hosts: by number, those that are there.
        dual_stack: whether the network has an IPv6 CIDR, too.
    """

    def __init__(self, gateway: Gateway, *, dual_stack: bool = False) -> None:
        self.gateway = gateway
        self.dual_stack = dual_stack
        self.hosts: dict[int, SimulatedHost] = {}
        self._next = 1

    def create_network(self) -> None:
        """Put the network."""
        subnets: tuple[IpNetwork, ...] = (OVERLAY, OVERLAY6) if self.dual_stack else (OVERLAY,)
        network = Network(name=NAME, mode=Mode.VXLAN, subnets=subnets, vni=Vni(VNI))
        check_network(network)
        self.gateway.commit([(network_key(NAME), encode_network(network))])

    def reserve(self, host: HostId, subnet: int) -> None:
        """Give a real host a subnet, which its agent will find when it starts."""
        for found in addressing(subnet, dual_stack=self.dual_stack):
            reservation = Reservation(network=NAME, subnet=found.subnet, host=host)
            key = subnet_key(NAME, found.subnet)
            self.gateway.commit([(key, encode_reservation(reservation))])

    def new_hosts(self, count: int) -> list[SimulatedHost]:
        """Hosts that were never there before; `add` puts them into etcd.

        Raises:
            ValueError: the network is too small for them.
        """
        numbers = range(self._next, self._next + count)
        if FIRST_SUBNET + numbers.stop > 1 << (24 - OVERLAY.prefixlen):
            raise ValueError(f"network {OVERLAY} has no subnet left for {count} more hosts")
        self._next += count
        return [SimulatedHost(n, FIRST_SUBNET + n, underlay_ip(n)) for n in numbers]

    def add(self, hosts: Sequence[SimulatedHost], lease: int = 0) -> int:
        """Let hosts join, in as few transactions as possible; returns the last revision.

        Args:
            lease: what their ``alive/`` keys hang on; 0: nothing, they live for ever.
        """
        if lease:
            self.gateway.write_all(([self._alive(host)] for host in hosts), lease)
            self.gateway.write_all(self._published(host) for host in hosts)
        else:
            self.gateway.write_all([self._alive(h), *self._published(h)] for h in hosts)
        self.hosts.update({host.number: host for host in hosts})
        return self.gateway.revision

    def remove(self, hosts: Sequence[SimulatedHost]) -> int:
        """Remove hosts for good, as ``meshnet host rm`` does."""
        self.gateway.write_all(_deleted(self._keys(host)) for host in hosts)
        for host in hosts:
            del self.hosts[host.number]
        return self.gateway.revision

    def move(self, host: SimulatedHost, number: int) -> SimulatedHost:
        """Give a host another underlay address (`underlay_ip` of `number`)."""
        moved = host._replace(underlay_ip=underlay_ip(number))
        self.gateway.commit([self._alive(moved), self._entry(moved)])
        self.hosts[host.number] = moved
        return moved

    def swap(self, one: SimulatedHost, other: SimulatedHost) -> None:
        """Give each of two hosts the other's subnet."""
        changed = (one._replace(subnet=other.subnet), other._replace(subnet=one.subnet))
        self.gateway.commit([write for host in changed for write in self._reservations(host)])
        self.hosts.update({host.number: host for host in changed})

    def inherit(self, gone: SimulatedHost) -> SimulatedHost:
        """Remove a host and give its subnet to a new one."""
        heir = self.new_hosts(1)[0]._replace(subnet=gone.subnet)
        removed = _deleted([alive_key(gone.id), host_key(gone.id)])
        self.gateway.commit([*removed, self._alive(heir), *self._published(heir)])
        del self.hosts[gone.number]
        self.hosts[heir.number] = heir
        return heir

    def objects(self, hosts: Iterable[SimulatedHost]) -> set[Object]:
        """Keys of what another host's kernel holds for these."""
        return {o for h in hosts for a in self.addressing(h) for o in a.objects()}

    def addressing(self, host: SimulatedHost) -> tuple[Addressing, ...]:
        """A host's subnets with all that follows from them."""
        return addressing(host.subnet, dual_stack=self.dual_stack)

    def _alive(self, host: SimulatedHost) -> Write:
        claim = Claim(instance=f"{host.number:016x}", underlay_ip=host.underlay_ip)
        return alive_key(host.id), encode_claim(claim)

    def _entry(self, host: SimulatedHost) -> Write:
        value = encode_host(Host(id=host.id, underlay_ip=host.underlay_ip))
        return host_key(host.id), value

    def _reservations(self, host: SimulatedHost) -> Iterator[Write]:
        for found in self.addressing(host):
            reservation = Reservation(network=NAME, subnet=found.subnet, host=host.id)
            yield subnet_key(NAME, found.subnet), encode_reservation(reservation)

    def _published(self, host: SimulatedHost) -> list[Write]:
        return [self._entry(host), *self._reservations(host)]

    def _keys(self, host: SimulatedHost) -> list[str]:
        reserved = (subnet_key(NAME, found.subnet) for found in self.addressing(host))
        return [alive_key(host.id), host_key(host.id), *reserved]


def _deleted(keys: Iterable[str]) -> list[Write]:
    return [(key, None) for key in keys]
