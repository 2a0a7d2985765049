"""Routes that others made: by hand, for a VPN, from DHCP or router advertisements.

A host may have a million routes from a routing daemon, so nobody dumps them.  The kernel filters a
dump by protocol, at 27 ms for 500,000 routes, and those of people and their tools have a few.

linux/rtnetlink.h.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from meshnet.kernel.wire import bulk, rtnl

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from meshnet.kernel.wire.rtnl import Body

RTPROT_BOOT, RTPROT_STATIC, RTPROT_RA, RTPROT_DHCP = 3, 4, 9, 16
RTA_MULTIPATH, RTA_VIA = 9, 18
_PROTOCOLS = (RTPROT_BOOT, RTPROT_STATIC, RTPROT_RA, RTPROT_DHCP)
_NEXTHOP = struct.Struct("=HBBi")
_FAMILY = struct.Struct("=H")


class HostRoute(NamedTuple):
    """A route of the main table; addresses are packed.

    Attributes:
        prefix: its destination; b"" with length 0: the default route.
        ifindices: the links that it leads to; none: it leads nowhere (``blackhole``).
        gateways: the gateways that it leads through.
    """

    prefix: bytes
    length: int
    ifindices: tuple[int, ...]
    gateways: tuple[bytes, ...]


def host_route_dumps() -> Iterator[bytes]:
    """Bodies of RTM_GETROUTE: one a family and protocol."""
    for family in (socket.AF_INET, socket.AF_INET6):
        for protocol in _PROTOCOLS:
            yield rtnl.RTMSG.pack(family, 0, 0, 0, bulk.RT_TABLE_MAIN, protocol, 0, 0, 0)


def decode_host_routes(bodies: Iterable[Body]) -> Iterator[HostRoute]:
    """The routes of a dump; a kernel that does not filter sends others, too."""
    for data, start, end in bodies:
        _, length, _, _, table, protocol, *_ = rtnl.RTMSG.unpack_from(data, start)
        if table == bulk.RT_TABLE_MAIN and protocol in _PROTOCOLS:
            attrs = rtnl.parse_attrs(data, start + rtnl.RTMSG.size, end)
            yield _decode(length, attrs)


def decode_found_route(data: bytes) -> HostRoute | None:
    """The route that answers a look-up (`meshnet.kernel.wire.route_lookups`)."""
    if len(data) < rtnl.RTMSG.size:
        return None
    length = rtnl.RTMSG.unpack_from(data)[1]
    return _decode(length, rtnl.parse_attrs(data, rtnl.RTMSG.size, len(data)))


def _decode(length: int, attrs: Mapping[int, bytes]) -> HostRoute:
    hops = [attrs, *_parse_multipath(attrs.get(RTA_MULTIPATH, b""))]
    indices = [rtnl.number_in(hop, bulk.RTA_OIF) for hop in hops if bulk.RTA_OIF in hop]
    gateways = [gateway for hop in hops if (gateway := _gateway_of(hop))]
    return HostRoute(attrs.get(bulk.RTA_DST, b""), length, tuple(indices), tuple(gateways))


def _parse_multipath(data: bytes) -> Iterator[dict[int, bytes]]:
    """The attributes of each ``struct rtnexthop``, with its ifindex as if it were one."""
    start = 0
    while start + _NEXTHOP.size <= len(data):
        length, _, _, ifindex = _NEXTHOP.unpack_from(data, start)
        if not _NEXTHOP.size <= length <= len(data) - start:
            return
        attrs = rtnl.parse_attrs(data, start + _NEXTHOP.size, start + length)
        yield {**attrs, bulk.RTA_OIF: rtnl.U32.pack(ifindex)}
        start += length + 3 & ~3


def _gateway_of(attrs: Mapping[int, bytes]) -> bytes:
    via = attrs.get(RTA_VIA, b"")  # a gateway of another family (RFC 5549)
    gateway = attrs.get(bulk.RTA_GATEWAY, via[_FAMILY.size :])
    return gateway if len(gateway) in (4, 16) else b""
