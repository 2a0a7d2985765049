"""The big tables, encoded and decoded: neighbours, FDB entries, nexthop objects, routes.

Pairs of functions between the values of `meshnet.state` and messages of `meshnet.kernel.wire.rtnl`.
`encode_…` gives whole messages, one an operation, numbered from `first` on; `decode_…` reads the
bodies of a dump, none shorter than its header (`rtnl.RtnlSocket.dump` sees to that), and leaves out
objects that are not ours, or whose addresses are of an impossible length.

With 10,000 hosts there are 40,000 messages each way, so a message is one ``pack``: its shape has
the attributes in it.  Decoding looks first whether a message has the attributes in the order that
Linux writes them, which is checked by their headers, and goes through them one by one if not.
"""

from __future__ import annotations

import functools
import socket
import struct
from typing import TYPE_CHECKING

from meshnet.kernel.wire import rtnl
from meshnet.kernel.wire.rtnl import AF_BRIDGE, RT_SCOPE_UNIVERSE
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
    from collections.abc import Iterable, Mapping, Sequence

    from meshnet.kernel.wire.rtnl import Body
    from meshnet.state import PackedIp
    from meshnet.tables import Op

NUD_PERMANENT, NTF_SELF, NTF_EXT_LEARNED = 0x80, 0x02, 0x10
NDA_DST, NDA_LLADDR, NDA_IFINDEX, NDA_PROTOCOL = 1, 2, 8, 12
NHA_ID, NHA_OIF, NHA_GATEWAY = 1, 5, 6
RTNH_F_ONLINK = 4
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC = 1, 4, 5, 6, 7
RTA_METRICS, RTA_TABLE, RTA_ENCAP, RTA_NH_ID = 8, 15, 22, 30
RT_TABLE_MAIN = 254
RTN_UNSPEC, RTN_UNICAST, RTN_UNREACHABLE = 0, 1, 7
IPV6_METRIC = 1024
"""The metric the kernel gives an IPv6 route that names none (IP6_RT_PRIO_USER)."""

FOREIGN_NEXTHOP = -1
"""`Route.nexthop_id` of a route of ours that somebody gave another way to go."""

_DELETE = rtnl.NLM_F_REQUEST
_CREATE = rtnl.NLM_F_REQUEST | rtnl.NLM_F_CREATE | rtnl.NLM_F_EXCL
_REPLACE = rtnl.NLM_F_REQUEST | rtnl.NLM_F_CREATE | rtnl.NLM_F_REPLACE
_U32 = rtnl.U32.pack
_FAMILY = {4: socket.AF_INET, 16: socket.AF_INET6}
"""By the length of a packed address."""
_MAC_BYTES = 6
_METRIC = {4: 0, 16: IPV6_METRIC}


def family_of(address: PackedIp) -> int:
    """AF_INET or AF_INET6, by the length of a packed address."""
    return _FAMILY[len(address)]


def shapes(layout: str) -> dict[int, struct.Struct]:
    """Whole messages, by the length of the address that is ``{n}`` in the layout of the body."""
    return {n: struct.Struct(f"=IHHII{layout.format(n=n)}") for n in (4, 16)}


def _head(length: int, kind: int) -> int:
    """An attribute's header as one number, to compare with."""
    return int(rtnl.U32.unpack(rtnl.ATTR_HEADER.pack(length, kind))[0])


# --- neighbours and FDB entries: one message type, two families (linux/neighbour.h) ------------

_NEIGHBOUR = shapes("BxxxiHBB HH{n}s HH6sxx HHBxxx")
_NEIGHBOUR_NAME = shapes("BxxxiHBB HH{n}s")
_FDB = shapes("BxxxiHBB HH6sxx HH{n}s")
_FDB_NAME = struct.Struct("=IHHIIBxxxiHBBHH6sxx")
_MAC_HEAD = _head(10, NDA_LLADDR)
_NEIGHBOUR_DUMP = {
    socket.AF_INET: (struct.Struct("=12xI4sI6s"), _head(8, NDA_DST)),
    socket.AF_INET6: (struct.Struct("=12xI16sI6s"), _head(20, NDA_DST)),
}
_FDB_DUMP = struct.Struct("=12xI6sxxI4s")
_DST_HEAD = _head(8, NDA_DST)


def encode_neighbours(ops: Sequence[Op], indices: Mapping[str, int], first: int) -> list[bytes]:
    """Set or delete permanent neighbours.

    Raises:
        KeyError: a link has no index.
    """
    messages = []
    for sequence, op in enumerate(ops, first):
        (dev, address), mac = op.key, op.value
        size = len(address)
        if mac is None:
            shape = _NEIGHBOUR_NAME[size]
            messages.append(shape.pack(
                shape.size, rtnl.RTM_DELNEIGH, _DELETE, sequence, 0,
                _FAMILY[size], indices[dev], NUD_PERMANENT, 0, 0,
                4 + size, NDA_DST, address,
            ))  # fmt: skip
            continue
        shape = _NEIGHBOUR[size]
        messages.append(shape.pack(
            shape.size, rtnl.RTM_NEWNEIGH, _REPLACE, sequence, 0,
            _FAMILY[size], indices[dev], NUD_PERMANENT, 0, 0,
            4 + size, NDA_DST, address,
            10, NDA_LLADDR, mac,
            5, NDA_PROTOCOL, ROUTE_PROTOCOL,
        ))  # fmt: skip
    return messages


def encode_fdb(ops: Sequence[Op], indices: Mapping[str, int], first: int) -> list[bytes]:
    """Set or delete where VXLAN devices send frames for a MAC.

    Entries have the mark of a control plane (``extern_learn``): see `meshnet.kernel.events`.

    Raises:
        KeyError: a link has no index.
    """
    messages = []
    for sequence, op in enumerate(ops, first):
        (dev, mac), remote = op.key, op.value
        if remote is None:
            messages.append(_FDB_NAME.pack(
                _FDB_NAME.size, rtnl.RTM_DELNEIGH, _DELETE, sequence, 0,
                AF_BRIDGE, indices[dev], NUD_PERMANENT, NTF_SELF, 0,
                10, NDA_LLADDR, mac,
            ))  # fmt: skip
            continue
        size = len(remote)
        shape = _FDB[size]
        messages.append(shape.pack(
            shape.size, rtnl.RTM_NEWNEIGH, _REPLACE, sequence, 0,
            AF_BRIDGE, indices[dev], NUD_PERMANENT, NTF_SELF | NTF_EXT_LEARNED, 0,
            10, NDA_LLADDR, mac,
            4 + size, NDA_DST, remote,
        ))  # fmt: skip
    return messages


def neighbour_dump(family: int, ifindex: int) -> bytes:
    """Body of RTM_GETNEIGH for one link; family AF_BRIDGE asks for its FDB."""
    return rtnl.NDMSG.pack(family, 0, 0, 0, 0) + rtnl.attr(NDA_IFINDEX, _U32(ifindex))


def decode_neighbours(bodies: Iterable[Body], dev: str, ifindex: int) -> dict[NeighbourKey, bytes]:
    """The permanent neighbours of a link; others (incomplete, multicast) are not reported."""
    found = {}
    for data, start, end in bodies:
        family, index, state, _, _ = rtnl.NDMSG.unpack_from(data, start)
        if index != ifindex or not state & NUD_PERMANENT:
            continue
        if family in _NEIGHBOUR_DUMP:
            shape, dst_head = _NEIGHBOUR_DUMP[family]
            if end - start >= shape.size:
                head1, address, head2, mac = shape.unpack_from(data, start)
                if head1 == dst_head and head2 == _MAC_HEAD:
                    found[NeighbourKey(dev, address)] = mac
                    continue
        attrs = rtnl.parse_attrs(data, start + 12, end)
        address, mac = attrs.get(NDA_DST, b""), attrs.get(NDA_LLADDR, b"")
        if len(address) in _FAMILY and len(mac) == _MAC_BYTES:
            found[NeighbourKey(dev, address)] = mac
    return found


def decode_fdb(bodies: Iterable[Body], dev: str, ifindex: int) -> dict[FdbKey, PackedIp]:
    """The FDB entries of a VXLAN device that name a remote."""
    found = {}
    for data, start, end in bodies:
        if rtnl.NDMSG.unpack_from(data, start)[1] != ifindex:
            continue
        if end - start >= _FDB_DUMP.size:
            head1, mac, head2, remote = _FDB_DUMP.unpack_from(data, start)
            if head1 == _MAC_HEAD and head2 == _DST_HEAD:
                found[FdbKey(dev, mac)] = remote
                continue
        attrs = rtnl.parse_attrs(data, start + 12, end)
        mac, remote = attrs.get(NDA_LLADDR, b""), attrs.get(NDA_DST, b"")
        if len(remote) in _FAMILY and len(mac) == _MAC_BYTES:
            found[FdbKey(dev, mac)] = remote
    return found


# --- nexthop objects (linux/nexthop.h) ---------------------------------------------------------

_NEXTHOP = shapes("BBBxI HHI HHI HH{n}s")
_NEXTHOP_NAME = struct.Struct("=IHHIIBBBxIHHI")
_NEXTHOP_DUMP = {
    socket.AF_INET: (struct.Struct("=8xIIIII4s"), _head(8, NHA_GATEWAY)),
    socket.AF_INET6: (struct.Struct("=8xIIIII16s"), _head(20, NHA_GATEWAY)),
}
_ID_HEAD, _OIF_HEAD = _head(8, NHA_ID), _head(8, NHA_OIF)


def encode_nexthops(ops: Sequence[Op], indices: Mapping[str, int], first: int) -> list[bytes]:
    """Set or delete nexthop objects.

    Raises:
        KeyError: a link has no index.
    """
    messages = []
    for sequence, op in enumerate(ops, first):
        if op.value is None:
            messages.append(_NEXTHOP_NAME.pack(
                _NEXTHOP_NAME.size, rtnl.RTM_DELNEXTHOP, _DELETE, sequence, 0,
                socket.AF_UNSPEC, 0, 0, 0,
                8, NHA_ID, op.key,
            ))  # fmt: skip
            continue
        dev, gateway = op.value
        size = len(gateway)
        shape = _NEXTHOP[size]
        messages.append(shape.pack(
            shape.size, rtnl.RTM_NEWNEXTHOP, _REPLACE if op.exists else _CREATE, sequence, 0,
            _FAMILY[size], RT_SCOPE_UNIVERSE, ROUTE_PROTOCOL, RTNH_F_ONLINK,
            8, NHA_ID, op.key,
            8, NHA_OIF, indices[dev],
            4 + size, NHA_GATEWAY, gateway,
        ))  # fmt: skip
    return messages


def encode_nexthop_probe(sequence: int) -> bytes:
    """Ask for our first nexthop object, to see whether the kernel knows what that is."""
    return _NEXTHOP_NAME.pack(
        _NEXTHOP_NAME.size, rtnl.RTM_GETNEXTHOP, rtnl.NLM_F_REQUEST, sequence, 0,
        socket.AF_UNSPEC, 0, 0, 0,
        8, NHA_ID, NEXTHOP_ID_FIRST,
    )  # fmt: skip


def nexthop_dump() -> bytes:
    """Body of RTM_GETNEXTHOP for all nexthop objects."""
    return rtnl.NHMSG.pack(socket.AF_UNSPEC, 0, 0, 0)


def decode_nexthops(
    bodies: Iterable[Body], names: Mapping[int, str]
) -> tuple[dict[int, Nexthop], set[int]]:
    """The nexthop objects in our range of ids: ours, and the ids of others'."""
    ours, foreign = {}, set()
    for data, start, end in bodies:
        family, _, protocol, _ = rtnl.NHMSG.unpack_from(data, start)
        if protocol == ROUTE_PROTOCOL and family in _NEXTHOP_DUMP:
            shape, gateway_head = _NEXTHOP_DUMP[family]
            if end - start >= shape.size:
                head1, nexthop_id, head2, index, head3, gateway = shape.unpack_from(data, start)
                if head1 == _ID_HEAD and head2 == _OIF_HEAD and head3 == gateway_head:
                    if NEXTHOP_ID_FIRST <= nexthop_id <= NEXTHOP_ID_LAST:
                        ours[nexthop_id] = Nexthop(names.get(index, ""), gateway)
                    continue
        attrs = rtnl.parse_attrs(data, start + 8, end)
        nexthop_id = rtnl.number_in(attrs, NHA_ID)
        if not NEXTHOP_ID_FIRST <= nexthop_id <= NEXTHOP_ID_LAST:
            continue
        gateway = attrs.get(NHA_GATEWAY, b"")
        if protocol == ROUTE_PROTOCOL and len(gateway) in _FAMILY and NHA_OIF in attrs:
            ours[nexthop_id] = Nexthop(names.get(rtnl.number_in(attrs, NHA_OIF), ""), gateway)
        else:
            foreign.add(nexthop_id)
    return ours, foreign


# --- routes (linux/rtnetlink.h) ----------------------------------------------------------------

_ROUTE = shapes("8BI HH{n}s HHI")
_NUMBER = struct.Struct("=HHI")
_ROUTE_DUMP4 = struct.Struct("=12xI4xI4sI4sII")
_ROUTE_DUMP6 = struct.Struct("=12xI4xI16sI16sIIII")
_ROUTE_HEADS4 = _head(8, RTA_TABLE), _head(8, RTA_DST), _head(8, RTA_PREFSRC), _head(8, RTA_NH_ID)
_ROUTE_HEADS6 = (
    *(_head(8, RTA_TABLE), _head(20, RTA_DST), _head(20, RTA_PREFSRC)),
    *(_head(8, RTA_PRIORITY), IPV6_METRIC, _head(8, RTA_NH_ID)),
)


def encode_routes(ops: Sequence[Op], indices: Mapping[str, int], first: int) -> list[bytes]:
    """Set or delete routes of the main table.

    Raises:
        KeyError: a link has no index.
    """
    messages = []
    for sequence, op in enumerate(ops, first):
        (prefix, length, metric), route = op.key, op.value
        if route is None:
            request, flags, kind, target = rtnl.RTM_DELROUTE, _DELETE, RTN_UNSPEC, b""
        else:
            request, flags = rtnl.RTM_NEWROUTE, _REPLACE if op.exists else _CREATE
            kind, target = _encode_target(route, indices)
        size = len(prefix)
        shape = _ROUTE[size]
        messages.append(shape.pack(
            shape.size + len(target), request, flags, sequence, 0,
            _FAMILY[size], length, 0, 0, RT_TABLE_MAIN, ROUTE_PROTOCOL, RT_SCOPE_UNIVERSE, kind,
            RTNH_F_ONLINK if route is not None and route.via and route.via.gateway else 0,
            4 + size, RTA_DST, prefix,
            8, RTA_PRIORITY, _METRIC[size] if metric is None else metric,
        ) + target)  # fmt: skip
    return messages


def _encode_target(route: Route, indices: Mapping[str, int]) -> tuple[int, bytes]:
    """Type of a route, and the attributes that say where it leads."""
    kind, target = RTN_UNREACHABLE, b""
    if route.nexthop_id:
        kind, target = RTN_UNICAST, _NUMBER.pack(8, RTA_NH_ID, route.nexthop_id)
    elif route.via is not None:
        dev, gateway = route.via
        kind, target = RTN_UNICAST, _NUMBER.pack(8, RTA_OIF, indices[dev])
        target += rtnl.attr(RTA_GATEWAY, gateway) if gateway else b""
    return kind, target + _source(route.source) if route.source else target


@functools.lru_cache
def _source(address: PackedIp) -> bytes:
    """Attribute for the preferred source, the same for all routes of a network."""
    return rtnl.attr(RTA_PREFSRC, address)


def route_dump(family: int) -> bytes:
    """Body of RTM_GETROUTE for our routes in the main table (the kernel filters)."""
    return rtnl.RTMSG.pack(family, 0, 0, 0, RT_TABLE_MAIN, ROUTE_PROTOCOL, 0, 0, 0)


def decode_routes(bodies: Iterable[Body], names: Mapping[int, str]) -> dict[RouteKey, Route]:
    """The routes of ours."""
    found = {}
    for data, start, end in bodies:
        family, length, _, _, table, protocol, _, kind, _ = rtnl.RTMSG.unpack_from(data, start)
        if protocol != ROUTE_PROTOCOL or table != RT_TABLE_MAIN:
            continue
        if kind != RTN_UNICAST:
            pass
        elif family == socket.AF_INET and end - start >= _ROUTE_DUMP4.size:
            head1, head2, prefix, head3, source, head4, nexthop_id = _ROUTE_DUMP4.unpack_from(
                data, start
            )
            if (head1, head2, head3, head4) == _ROUTE_HEADS4:
                found[RouteKey(prefix, length)] = Route(nexthop_id, source)
                continue
        elif family == socket.AF_INET6 and end - start >= _ROUTE_DUMP6.size:
            head1, head2, prefix, head3, source, head4, metric, head5, nexthop_id = (
                _ROUTE_DUMP6.unpack_from(data, start)
            )
            if (head1, head2, head3, head4, metric, head5) == _ROUTE_HEADS6:
                found[RouteKey(prefix, length)] = Route(nexthop_id, source)
                continue
        attrs = rtnl.parse_attrs(data, start + 12, end)
        prefix = attrs.get(RTA_DST, bytes(4 if family == socket.AF_INET else 16))
        if len(prefix) not in _FAMILY:
            continue
        metric = rtnl.number_in(attrs, RTA_PRIORITY)
        key = RouteKey(prefix, length, None if metric == _METRIC[len(prefix)] else metric)
        found[key] = _decode_target(kind, attrs, names)
    return found


def _decode_target(kind: int, attrs: Mapping[int, bytes], names: Mapping[int, str]) -> Route:
    source = attrs.get(RTA_PREFSRC, b"")
    if kind == RTN_UNREACHABLE:
        return Route(0, source)
    if RTA_NH_ID in attrs:
        return Route(rtnl.number_in(attrs, RTA_NH_ID), source)
    if kind == RTN_UNICAST and RTA_OIF in attrs and RTA_ENCAP not in attrs:
        dev = names.get(rtnl.number_in(attrs, RTA_OIF), "")
        if dev or RTA_GATEWAY in attrs:
            return Route(0, source, Nexthop(dev, attrs.get(RTA_GATEWAY, b"")))
    return Route(FOREIGN_NEXTHOP, source)
