"""What a host's links and routes lead to: addresses that no network may take from it."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING

from meshnet.backends import Occupant
from meshnet.kernel.drivers.links import is_ours
from meshnet.kernel.wire import rtnl
from meshnet.kernel.wire.host_routes import HostRoute, decode_host_routes, host_route_dumps

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from meshnet.kernel.drivers.namespace import HostNamespace
    from meshnet.kernel.wire.links import AddressInfo
    from meshnet.model import IpNetwork

_DEFAULT_BITS = 1
"""A route with a prefix this short is a default route, or half of one, as VPNs make."""


def dump_occupants(
    namespace: HostNamespace,
    held: Iterable[AddressInfo],
    outside: Iterable[HostRoute],
    underlay_dev: str,
) -> tuple[Occupant, ...]:
    """What the host's links and routes lead to, each once; its own networks are left out.

    Args:
        held: the host's addresses of global scope.
        outside: the routes to addresses outside.
    """
    found = [
        occupant
        for info in held
        for occupant in _of_address(info, _name(namespace, info.ifindex), underlay_dev)
    ]
    for route in outside:
        found += _gateways(route, namespace)
    for body in host_route_dumps():
        for route in decode_host_routes(namespace.rtnl.dump(rtnl.RTM_GETROUTE, body)):
            found += _of_route(route, namespace)
    return tuple(dict.fromkeys(found))


def _of_address(info: AddressInfo, dev: str, underlay_dev: str) -> Iterator[Occupant]:
    if not dev or is_ours(dev):
        return
    vital = dev == underlay_dev
    yield Occupant(_network(info.address), f"an address of link {dev}", dev, vital)
    subnet = _network(info.peer, info.prefix_length)
    if subnet.prefixlen < subnet.max_prefixlen or info.peer != info.address:
        yield Occupant(subnet, f"the subnet of link {dev}", dev, vital)


def _of_route(route: HostRoute, namespace: HostNamespace) -> Iterator[Occupant]:
    devs = [_name(namespace, index) for index in route.ifindices]
    if any(map(is_ours, devs)):
        return
    if route.length <= _DEFAULT_BITS:
        yield from _gateways(route, namespace)
    elif route.prefix:
        over = f"over link {devs[0]}" if devs else "to nowhere"
        prefix = _network(route.prefix, route.length)
        aggregate = bool(route.gateways) or not devs
        what = f"to which this host has a route {over}"
        yield Occupant(prefix, what, devs[0] if devs else "", vital=True, aggregate=aggregate)


def _gateways(route: HostRoute, namespace: HostNamespace) -> Iterator[Occupant]:
    devs = [_name(namespace, index) for index in route.ifindices]
    if devs and not any(map(is_ours, devs)):
        for gateway in route.gateways:
            yield Occupant(_network(gateway), f"a gateway on link {devs[0]}", devs[0], vital=True)


def _name(namespace: HostNamespace, ifindex: int) -> str:
    link = namespace.by_index.get(ifindex)
    return link.name if link is not None else ""


def _network(packed: bytes, length: int | None = None) -> IpNetwork:
    make = IPv4Network if len(packed) == 4 else IPv6Network
    return make((packed, len(packed) * 8 if length is None else length), strict=False)
