"""The big tables, encoded and decoded: neighbours, FDB entries, nexthop objects, routes.

Pairs of functions between the values of `meshnet.state` and messages of `meshnet.kernel.rtnl`.
`encode_…` gives the request for one object; `decode_…` reads one message of a dump and returns
None for an object that is not ours.  A message that is shorter than its header, which Linux never
sends, raises `struct.error`.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from meshnet.kernel import rtnl
from meshnet.state import (
    NEXTHOP_ID_FIRST,
    NEXTHOP_ID_LAST,
    ROUTE_PROTOCOL,
    FdbKey,
    NeighbourKey,
    Nexthop,
    Route,
    RouteKey,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshnet.kernel.rtnl import Message
    from meshnet.state import PackedIp

AF_BRIDGE = 7
NUD_PERMANENT, NTF_SELF = 0x80, 0x02
NDA_DST, NDA_LLADDR, NDA_IFINDEX, NDA_PROTOCOL = 1, 2, 8, 12
NHA_ID, NHA_OIF, NHA_GATEWAY = 1, 5, 6
RTNH_F_ONLINK = 4
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC = 1, 4, 5, 6, 7
RTA_METRICS, RTA_NH_ID = 8, 30
RT_TABLE_MAIN, RT_SCOPE_UNIVERSE = 254, 0
RTN_UNICAST, RTN_UNREACHABLE = 1, 7
IPV6_METRIC = 1024
"""The metric the kernel gives an IPv6 route that names none (IP6_RT_PRIO_USER)."""

FOREIGN_NEXTHOP = -1
"""`Route.nexthop_id` of a route of ours that somebody gave another way to go."""

_CREATE = rtnl.NLM_F_CREATE | rtnl.NLM_F_EXCL
_REPLACE = rtnl.NLM_F_CREATE | rtnl.NLM_F_REPLACE
_U32 = rtnl.U32.pack


def family_of(address: PackedIp) -> int:
    """AF_INET or AF_INET6, by the length of a packed address."""
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6


# --- neighbours and FDB entries: one message type, two families (linux/neighbour.h) ------------


def encode_neighbour(key: NeighbourKey, mac: bytes | None, ifindex: int) -> rtnl.Request:
    """Set (or with None delete) a permanent neighbour."""
    header = rtnl.NDMSG.pack(family_of(key.address), ifindex, NUD_PERMANENT, 0, 0)
    body = header + rtnl.attr(NDA_DST, key.address)
    if mac is None:
        return rtnl.Request(rtnl.RTM_DELNEIGH, 0, body)
    body += rtnl.attr(NDA_LLADDR, mac) + rtnl.attr(NDA_PROTOCOL, bytes((ROUTE_PROTOCOL,)))
    return rtnl.Request(rtnl.RTM_NEWNEIGH, _REPLACE, body)


def encode_fdb(key: FdbKey, remote: PackedIp | None, ifindex: int) -> rtnl.Request:
    """Set (or with None delete) where a VXLAN device sends frames for a MAC."""
    header = rtnl.NDMSG.pack(AF_BRIDGE, ifindex, NUD_PERMANENT, NTF_SELF, 0)
    body = header + rtnl.attr(NDA_LLADDR, key.mac)
    if remote is None:
        return rtnl.Request(rtnl.RTM_DELNEIGH, 0, body)
    return rtnl.Request(rtnl.RTM_NEWNEIGH, _REPLACE, body + rtnl.attr(NDA_DST, remote))


def neighbour_dump(family: int, ifindex: int) -> bytes:
    """Body of RTM_GETNEIGH for one link; family AF_BRIDGE asks for its FDB."""
    return rtnl.NDMSG.pack(family, 0, 0, 0, 0) + rtnl.attr(NDA_IFINDEX, _U32(ifindex))


def decode_neighbour(message: Message, dev: str, ifindex: int) -> tuple[NeighbourKey, bytes] | None:
    """A permanent neighbour of the link; others (incomplete, multicast) are not reported."""
    _, index, state, _, _ = rtnl.NDMSG.unpack_from(message.data, message.start)
    if index != ifindex or not state & NUD_PERMANENT:
        return None
    attrs = rtnl.parse_attrs(message.data, message.start + 12, message.end)
    if NDA_DST not in attrs or NDA_LLADDR not in attrs:
        return None
    return NeighbourKey(dev, attrs[NDA_DST]), attrs[NDA_LLADDR]


def decode_fdb(message: Message, dev: str, ifindex: int) -> tuple[FdbKey, PackedIp] | None:
    """An FDB entry of the VXLAN device that names a remote."""
    _, index, _, _, _ = rtnl.NDMSG.unpack_from(message.data, message.start)
    if index != ifindex:
        return None
    attrs = rtnl.parse_attrs(message.data, message.start + 12, message.end)
    if NDA_DST not in attrs or NDA_LLADDR not in attrs:
        return None
    return FdbKey(dev, attrs[NDA_LLADDR]), attrs[NDA_DST]


# --- nexthop objects (linux/nexthop.h) ---------------------------------------------------------


def encode_nexthop(
    nexthop_id: int, nexthop: Nexthop | None, ifindex: int, *, exists: bool
) -> rtnl.Request:
    """Set (or with None delete) a nexthop object."""
    identity = rtnl.attr(NHA_ID, _U32(nexthop_id))
    if nexthop is None:
        return rtnl.Request(
            rtnl.RTM_DELNEXTHOP, 0, rtnl.NHMSG.pack(socket.AF_UNSPEC, 0, 0, 0) + identity
        )
    header = rtnl.NHMSG.pack(
        family_of(nexthop.gateway), RT_SCOPE_UNIVERSE, ROUTE_PROTOCOL, RTNH_F_ONLINK
    )
    body = (
        header
        + identity
        + rtnl.attr(NHA_OIF, _U32(ifindex))
        + rtnl.attr(NHA_GATEWAY, nexthop.gateway)
    )
    return rtnl.Request(rtnl.RTM_NEWNEXTHOP, _REPLACE if exists else _CREATE, body)


def nexthop_dump() -> bytes:
    """Body of RTM_GETNEXTHOP for all nexthop objects."""
    return rtnl.NHMSG.pack(socket.AF_UNSPEC, 0, 0, 0)


def decode_nexthop(message: Message, names: Mapping[int, str]) -> tuple[int, Nexthop | None] | None:
    """A nexthop object in our range of ids: the object if it is ours, else None in its place."""
    _, _, protocol, _ = rtnl.NHMSG.unpack_from(message.data, message.start)
    attrs = rtnl.parse_attrs(message.data, message.start + 8, message.end)
    if NHA_ID not in attrs:
        return None
    (nexthop_id,) = rtnl.U32.unpack(attrs[NHA_ID])
    if not NEXTHOP_ID_FIRST <= nexthop_id <= NEXTHOP_ID_LAST:
        return None
    if protocol != ROUTE_PROTOCOL or NHA_GATEWAY not in attrs or NHA_OIF not in attrs:
        return nexthop_id, None
    dev = names.get(rtnl.U32.unpack(attrs[NHA_OIF])[0], "")
    return nexthop_id, Nexthop(dev, attrs[NHA_GATEWAY])


# --- routes (linux/rtnetlink.h) ----------------------------------------------------------------


def encode_route(key: RouteKey, route: Route | None, *, exists: bool) -> rtnl.Request:
    """Set (or with None delete) a route of the main table."""
    family = family_of(key.prefix)
    kind = RTN_UNREACHABLE if route is not None and route.nexthop_id == 0 else RTN_UNICAST
    if route is None:
        kind = 0  # RTN_UNSPEC: whatever it is
    header = rtnl.RTMSG.pack(
        family, key.prefix_length, 0, 0, RT_TABLE_MAIN, ROUTE_PROTOCOL, RT_SCOPE_UNIVERSE, kind, 0
    )
    body = header + rtnl.attr(RTA_DST, key.prefix)
    if family == socket.AF_INET6:
        body += rtnl.attr(RTA_PRIORITY, _U32(IPV6_METRIC))
    if route is None:
        return rtnl.Request(rtnl.RTM_DELROUTE, 0, body)
    if route.nexthop_id:
        body += rtnl.attr(RTA_NH_ID, _U32(route.nexthop_id))
    if route.source:
        body += rtnl.attr(RTA_PREFSRC, route.source)
    return rtnl.Request(rtnl.RTM_NEWROUTE, _REPLACE if exists else _CREATE, body)


def route_dump(family: int) -> bytes:
    """Body of RTM_GETROUTE for our routes in the main table (the kernel filters)."""
    return rtnl.RTMSG.pack(family, 0, 0, 0, RT_TABLE_MAIN, ROUTE_PROTOCOL, 0, 0, 0)


def decode_route(message: Message) -> tuple[RouteKey, Route] | None:
    """A route of ours."""
    family, length, _, _, table, protocol, _, kind, _ = rtnl.RTMSG.unpack_from(
        message.data, message.start
    )
    if protocol != ROUTE_PROTOCOL or table != RT_TABLE_MAIN:
        return None
    attrs = rtnl.parse_attrs(message.data, message.start + 12, message.end)
    priority = rtnl.U32.unpack(attrs[RTA_PRIORITY])[0] if RTA_PRIORITY in attrs else 0
    if priority != (IPV6_METRIC if family == socket.AF_INET6 else 0):
        return None
    prefix = attrs.get(RTA_DST, bytes(4 if family == socket.AF_INET else 16))
    if kind == RTN_UNREACHABLE:
        nexthop_id = 0
    elif RTA_NH_ID in attrs:
        (nexthop_id,) = rtnl.U32.unpack(attrs[RTA_NH_ID])
    else:
        nexthop_id = FOREIGN_NEXTHOP
    return RouteKey(prefix, length), Route(nexthop_id, attrs.get(RTA_PREFSRC, b""))


# --- the way to an underlay address ------------------------------------------------------------

RTM_F_FIB_MATCH = 0x2000
RTAX_MTU = 2


def encode_route_lookup(address: PackedIp) -> rtnl.Request:
    """Ask which route the kernel would take; the answer is the route as configured."""
    header = rtnl.RTMSG.pack(
        family_of(address), len(address) * 8, 0, 0, 0, 0, 0, 0, RTM_F_FIB_MATCH
    )
    return rtnl.Request(rtnl.RTM_GETROUTE, 0, header + rtnl.attr(RTA_DST, address))


def decode_route_lookup(message: Message) -> tuple[int, bool, int] | None:
    """Output ifindex, whether there is no gateway, MTU metric (0: none); None: no way to go."""
    kind = rtnl.RTMSG.unpack_from(message.data, message.start)[7]
    attrs = rtnl.parse_attrs(message.data, message.start + 12, message.end)
    if kind != RTN_UNICAST or RTA_OIF not in attrs:
        return None
    metrics = attrs.get(RTA_METRICS, b"")
    mtu = rtnl.parse_attrs(metrics, 0, len(metrics)).get(RTAX_MTU)
    (ifindex,) = rtnl.U32.unpack(attrs[RTA_OIF])
    return ifindex, RTA_GATEWAY not in attrs, rtnl.U32.unpack(mtu)[0] if mtu else 0
