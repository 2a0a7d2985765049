"""What already has addresses of a network's CIDRs: etcd, gateways, other hosts, links, routes.

A route of ours for a CIDR, or for a subnet of it, would lead packets for them into the network.
Networks of mode ``macvlan`` and ``underlay-bridge`` are the physical network itself, so nothing in
them is in the way.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import TYPE_CHECKING, NamedTuple

from meshnet.backends import Addressing, Occupant
from meshnet.backends.table import addressing_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from meshnet.model import Host, HostId, IpAddress, IpNetwork, Network

_SHOWN = 5


class Span(NamedTuple):
    """The addresses of a CIDR, as numbers."""

    version: int
    first: int
    last: int


def spans_of(networks: Iterable[Network]) -> frozenset[Span]:
    """The addresses that networks take from the hosts' own routing."""
    return frozenset(
        _span(cidr)
        for network in networks
        if addressing_of(network) is not Addressing.POOL
        for cidr in network.subnets
    )


def is_within(address: IpAddress, spans: Iterable[Span]) -> bool:
    """Whether an address lies in any of the spans."""
    number = int(address)
    return any(s.version == address.version and s.first <= number <= s.last for s in spans)


def store_occupants(addresses: Iterable[IpAddress]) -> list[Occupant]:
    """What etcd's addresses occupy."""
    return [
        Occupant(_alone(a), "an address of etcd", vital=True) for a in sorted(addresses, key=str)
    ]


class Underlays:
    """The underlay addresses of hosts, in order: so those in a CIDR are found without a scan."""

    def __init__(self, hosts: Iterable[Host]) -> None:
        self._owners: dict[tuple[int, int], HostId] = {
            (host.underlay_ip.version, int(host.underlay_ip)): host.id for host in hosts
        }
        self._order = sorted(self._owners)

    def inside(self, network: Network) -> list[Occupant]:
        """The occupants that are other hosts' underlay addresses."""
        found = []
        for span in spans_of([network]):
            begin = bisect_left(self._order, (span.version, span.first))
            end = bisect_right(self._order, (span.version, span.last))
            for key in self._order[begin:end]:
                what = f"the underlay address of host {self._owners[key]}"
                address = ip_address(key[1].to_bytes(4 if key[0] == 4 else 16, "big"))
                found.append(Occupant(_alone(address), what))
        return found


def check_free(network: Network, occupants: Iterable[Occupant]) -> str | None:
    """Why a network should not be created on a mesh with such a host; None: nothing is in its way.

    Stricter than `refusal`: whoever creates a network can choose another CIDR.
    """
    for cidr, occupant in _meeting(network, occupants):
        if occupant.prefix.prefixlen >= cidr.prefixlen or not occupant.aggregate:
            return f"{_describe(cidr, occupant)}: choose another --subnet"
    return None


def refusal(
    network: Network, subnets: Sequence[IpNetwork], occupants: Iterable[Occupant]
) -> str | None:
    """Why a host cannot have a network; None: it can.

    What has more than the CIDR does not count: the routes to the network are more specific, and
    the network was there first.

    Args:
        subnets: the host's own subnets of it.
    """
    for cidr, occupant in _within(network, occupants):
        if (
            occupant.vital
            or occupant.prefix.prefixlen == cidr.prefixlen
            or overlaps_any(occupant.prefix, subnets)
        ):
            return (
                f"{_describe(cidr, occupant)}: this host has no part in the network until that has "
                "other addresses, or the network is created again with another --subnet"
            )
    return None


def kept_off(network: Network, occupants: Iterable[Occupant]) -> tuple[Occupant, ...]:
    """What lies within a network's CIDRs, and must not be hidden by routes of ours."""
    return tuple(occupant for _, occupant in _within(network, occupants))


def strangers(network: Network, members: Collection[Occupant]) -> list[str]:
    """Errors that name the hosts whose underlay address is in a network's CIDR."""
    shown = [
        f"{_describe(cidr, occupant)}: give that host an underlay address outside the network"
        for cidr, occupant in _within(network, members)
    ]
    left = len(shown) - _SHOWN
    return [*shown[:_SHOWN], *([f"and {left} more like these"] if left > 0 else [])]


def hidden_by(subnet: IpNetwork, occupants: Iterable[Occupant]) -> Occupant | None:
    """What a route to a subnet would hide; None: nothing."""
    return next((o for o in occupants if _overlap(o.prefix, subnet)), None)


def overlaps_any(prefix: IpNetwork, others: Iterable[IpNetwork]) -> bool:
    """Whether a prefix has an address in common with any of the others."""
    return any(_overlap(prefix, other) for other in others)


def reserved_apart(network: Network, occupants: Iterable[Occupant]) -> tuple[IpNetwork, ...]:
    """The parts of a network's CIDRs from which a host should not reserve its subnet."""
    return tuple(
        occupant.prefix
        for cidr, occupant in _within(network, occupants)
        if occupant.prefix.prefixlen > cidr.prefixlen
    )


def _within(
    network: Network, occupants: Iterable[Occupant]
) -> Iterable[tuple[IpNetwork, Occupant]]:
    return (
        (cidr, occupant)
        for cidr, occupant in _meeting(network, occupants)
        if occupant.prefix.prefixlen >= cidr.prefixlen
    )


def _meeting(
    network: Network, occupants: Iterable[Occupant]
) -> Iterable[tuple[IpNetwork, Occupant]]:
    if addressing_of(network) is Addressing.POOL:
        return
    for occupant in occupants:
        for cidr in network.subnets:
            if _overlap(cidr, occupant.prefix):
                yield cidr, occupant


def _overlap(one: IpNetwork, other: IpNetwork) -> bool:
    return one.version == other.version and one.overlaps(other)


def _describe(cidr: IpNetwork, occupant: Occupant) -> str:
    prefix = occupant.prefix
    if prefix.prefixlen == prefix.max_prefixlen:
        return f"subnet {cidr} contains {prefix.network_address}, {occupant.what}"
    verb = "contains" if prefix.prefixlen > cidr.prefixlen else "overlaps"
    return f"subnet {cidr} {verb} {prefix}, {occupant.what}"


def _alone(address: IpAddress) -> IpNetwork:
    return IPv4Network(address) if address.version == 4 else IPv6Network(address)


def _span(cidr: IpNetwork) -> Span:
    return Span(cidr.version, int(cidr.network_address), int(cidr.broadcast_address))
