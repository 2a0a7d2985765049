"""Address management: a host's subnet from a network, an endpoint's address from a subnet.

On the physical network, endpoints of all hosts share one pool: the network's range, or its whole
CIDR, without the addresses of routers and hosts.

Within a host's subnet the first address is the gateway.  Never given out are, for IPv4, the
subnet's own address and the broadcast address; for IPv6, the subnet-router anycast address (RFC
4291 §2.6.1).

Pure: the caller says which are taken; only the order of release is remembered here.
"""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv4Address, IPv6Address
from itertools import chain
from typing import TYPE_CHECKING

from meshnet.errors import ConflictError, PoolExhaustedError, UsageError
from meshnet.model import AddressRange

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from meshnet.model import IpAddress, IpNetwork, Network

MAX_SUBNET_BITS = 32
"""At most 2^32 host subnets for each network: VTEP MACs hold 32 bits of the subnet."""

MAX_POOL_ADDRESSES = 1 << 32
"""Most addresses of an underlay network: numbers that people can still read."""

COOLDOWN = 64
"""A freed address is given out again only after this many others were freed, while any is left."""

_PROBES = 64
"""Random tries before a search in order: with half of a pool taken, one in 2^64 comes to that."""


def gateway_of(subnet: IpNetwork) -> IpAddress:
    """The gateway: the first address after the subnet's own."""
    return subnet.network_address + 1


def check_host_prefix(cidr: IpNetwork, host_prefix: int) -> None:
    """Refuse a host prefix that `cidr` cannot be cut into.

    Raises:
        UsageError: `host_prefix` is shorter than the CIDR's, leaves no room for an endpoint, or
            cuts it into more than 2^32 subnets.
    """
    longest = cidr.max_prefixlen - 2
    if cidr.prefixlen > longest:
        raise UsageError(
            f"{cidr} has no room for a host's subnet: choose a prefix of /{longest} or shorter"
        )
    if not cidr.prefixlen <= host_prefix <= longest:
        raise UsageError(
            f"host prefix /{host_prefix} does not fit {cidr}: "
            f"choose between /{cidr.prefixlen} and /{longest}"
        )
    if host_prefix - cidr.prefixlen > MAX_SUBNET_BITS:
        raise UsageError(
            f"{cidr} holds more than 2^{MAX_SUBNET_BITS} subnets of /{host_prefix}: "
            f"choose a host prefix of /{cidr.prefixlen + MAX_SUBNET_BITS} or shorter"
        )


def choose_subnet(
    network: Network,
    version: int,
    taken: Collection[IpNetwork],
    *,
    apart: Collection[IpNetwork] = (),
    random_below: Callable[[int], int] | None = None,
) -> IpNetwork:
    """Choose a free host subnet of the network's CIDR of an IP version.

    Args:
        taken: the reserved subnets; any that is not a host subnet does not count.
        apart: what it must not overlap.
        random_below: returns a random number in [0, n): choose any free subnet, so that hosts that
            choose at the same time seldom choose the same.  None: choose the lowest.

    Raises:
        PoolExhaustedError: every subnet is reserved, or overlaps one of `apart`.
    """
    cidr = next(s for s in network.subnets if s.version == version)
    prefix = network.host_prefix_of(version)
    count = 1 << (prefix - cidr.prefixlen)
    step = 1 << (cidr.max_prefixlen - prefix)
    base = int(cidr.network_address)
    start = 0
    if random_below is not None:
        # Unless nearly all are taken, one of these is free, and each is equally likely.
        for _ in range(_PROBES):
            start = random_below(count)
            subnet = type(cidr)((base + start * step, prefix))
            if subnet not in taken and _is_apart(subnet, apart):
                return subnet
    # As numbers: making 65,536 network objects takes 0.1 s.
    used = {int(s.network_address) for s in taken if s.version == version and s.prefixlen == prefix}
    for index in chain(range(start, count), range(start)):
        if base + index * step not in used:
            subnet = type(cidr)((base + index * step, prefix))
            if _is_apart(subnet, apart):
                return subnet
    others = f", or overlap {', '.join(map(str, apart))} of this host" if apart else ""
    raise PoolExhaustedError(
        f"network {network.name}: all {count} subnets of /{prefix} in {cidr} are reserved{others}: "
        "remove hosts that are gone (meshnet host rm ID) or create a larger network"
    )


def pool_range(network: Network, version: int) -> AddressRange:
    """The pool of endpoints' addresses of an IP version, on an underlay network.

    At most 2^32 addresses (`MAX_POOL_ADDRESSES`).
    """
    cidr = next(s for s in network.subnets if s.version == version)
    make = _address_type(cidr)
    # In IPv6 the CIDR's own address is its routers' anycast address (RFC 4291 §2.6.1).
    first = int(cidr.network_address) + 1
    last = int(cidr.broadcast_address) - (1 if version == 4 else 0)
    for addresses in network.ranges:
        if addresses.version == version:
            first, last = max(first, int(addresses.first)), min(last, int(addresses.last))
    return AddressRange(make(first), make(min(last, first + MAX_POOL_ADDRESSES - 1)))


def check_pool_address(
    network: Network, wanted: IpAddress, excluded: Collection[IpAddress]
) -> None:
    """Refuse an address that no endpoint of an underlay network may have.

    Args:
        excluded: addresses of routers and hosts.

    Raises:
        UsageError: it is outside the pool or excluded.
    """
    if wanted.version not in {s.version for s in network.subnets}:
        raise UsageError(
            f"address {wanted} is IPv{wanted.version}, but network {network.name} has only "
            f"{', '.join(map(str, network.subnets))}: choose one within it"
        )
    pool = pool_range(network, wanted.version)
    if wanted not in pool:
        raise UsageError(
            f"address {wanted} is outside {pool}, the addresses of network {network.name}: choose "
            "one within it, or leave --ip out"
        )
    if wanted in excluded:
        raise UsageError(
            f"address {wanted} belongs to a gateway or a host of network {network.name}: choose "
            "another, or leave --ip out"
        )


def choose_address(
    network: Network,
    version: int,
    taken: Collection[IpAddress],
    *,
    random_below: Callable[[int], int] | None = None,
) -> IpAddress:
    """Choose a free address of an underlay network's pool.

    Args:
        taken: addresses that are held or excluded.
        random_below: returns a random number in [0, n): choose any free address, so that hosts that
            choose at the same time seldom choose the same.  None: choose the lowest.

    Raises:
        PoolExhaustedError: no address is free.
    """
    pool = pool_range(network, version)
    make = _address_type(pool.first)
    base, count = int(pool.first), int(pool.last) - int(pool.first) + 1
    start = 0
    if random_below is not None:
        for _ in range(_PROBES):
            start = random_below(count)
            address = make(base + start)
            if address not in taken:
                return address
    for offset in chain(range(start, count), range(start)):
        address = make(base + offset)
        if address not in taken:
            return address
    raise PoolExhaustedError(
        f"network {network.name}: all {count} addresses of {pool} are taken: detach an endpoint, "
        "remove hosts that are gone (meshnet host rm ID), or create the network with a larger "
        "--range"
    )


class AddressPool:
    """The addresses of one subnet, on the host that owns it.

    The lowest free address is given out.  A freed one rests until `COOLDOWN` others were freed
    after it, or no other is left, so that late packets for its last holder do not reach the next.

    Args:
        resting: addresses that were freed before this pool was made.
    """

    def __init__(
        self,
        network: str,
        subnet: IpNetwork,
        in_use: Collection[IpAddress] = (),
        resting: Collection[IpAddress] = (),
    ) -> None:
        self.network = network
        self.subnet = subnet
        self._used: set[IpAddress] = set(in_use)
        self._resting: OrderedDict[IpAddress, None] = OrderedDict.fromkeys(
            address for address in resting if address not in self._used
        )

    def allocate(
        self, wanted: IpAddress | None = None, *, former: IpAddress | None = None
    ) -> IpAddress:
        """Give out `wanted`; else `former` if it is free; else the lowest that is free and rested.

        Raises:
            UsageError: `wanted` is not an address that an endpoint in this subnet may have.
            ConflictError: `wanted` is in use.
            PoolExhaustedError: no address is left.
        """
        if wanted is not None:
            address = self._check(wanted)
        elif former is not None and former not in self._used:
            address = self._check(former)
        else:
            address = self._lowest()
        self._resting.pop(address, None)
        self._used.add(address)
        return address

    def free(self, address: IpAddress) -> None:
        """Give an address back; one that is not in use is ignored."""
        if address in self._used:
            self._used.remove(address)
            self._resting[address] = None
            if len(self._resting) > COOLDOWN:
                self._resting.popitem(last=False)

    def _check(self, wanted: IpAddress) -> IpAddress:
        if wanted.version != self.subnet.version or wanted not in self.subnet:
            raise UsageError(
                f"address {wanted} is outside {self.subnet}, this host's subnet of network "
                f"{self.network}: choose one within it, or leave --ip out"
            )
        first, last = self._bounds()
        if not first <= int(wanted) <= last:
            make = _address_type(self.subnet)
            raise UsageError(
                f"address {wanted} is the network, gateway or broadcast address of "
                f"{self.subnet}: choose between {make(first)} and {make(last)}"
            )
        if wanted in self._used:
            raise ConflictError(
                f"address {wanted} is taken in network {self.network}: "
                "choose another, or leave --ip out (meshnet endpoint ls shows who has it)"
            )
        return wanted

    def _bounds(self) -> tuple[int, int]:
        first = int(self.subnet.network_address) + 2
        last = int(self.subnet.broadcast_address) - (1 if self.subnet.version == 4 else 0)
        return first, last

    def _lowest(self) -> IpAddress:
        first, last = self._bounds()
        # Not ip_address(), which takes any number below 2^32 for an IPv4 address.
        make = _address_type(self.subnet)
        # Among len(used) + len(resting) + 1 candidates at least one is free, so this is short.
        for number in range(first, last + 1):
            address = make(number)
            if address not in self._used and address not in self._resting:
                return address
        if self._resting:
            return next(iter(self._resting))
        raise PoolExhaustedError(
            f"network {self.network}: all {last - first + 1} addresses of {self.subnet} are in "
            "use: detach an endpoint or create the network with a shorter --host-prefix"
        )


def _is_apart(subnet: IpNetwork, others: Iterable[IpNetwork]) -> bool:
    return not any(subnet.version == o.version and subnet.overlaps(o) for o in others)


def _address_type(like: IpNetwork | IpAddress) -> type[IPv4Address] | type[IPv6Address]:
    return IPv4Address if like.version == 4 else IPv6Address
