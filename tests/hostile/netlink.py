"""Answers and notifications of the kernel, truncated or with wrong lengths."""

from __future__ import annotations

import errno
import struct
from ipaddress import ip_interface
from typing import TYPE_CHECKING

from meshnet.kernel.events import EventFilter, nftables_concerns_us
from meshnet.kernel.wire import bulk, links, route_lookups, rtnl
from meshnet.state import (
    NEXTHOP_ID_FIRST,
    FdbKey,
    NeighbourKey,
    Nexthop,
    Route,
    RouteKey,
)
from meshnet.tables import Op, Table
from tests.hostile.campaign import Campaign, assert_clear, damage_bytes, plain
from tests.unit.messages import datagram

if TYPE_CHECKING:
    from random import Random

_DEV, _INDEX = "mnv1", 77
_NAMES = {_INDEX: _DEV}
_INDICES = {_DEV: _INDEX}
_SEQUENCE = 1


def _op(table: Table, key: object, value: object) -> Op:
    return Op(table, key, value, False)


def _link() -> bytes:
    data = rtnl.attr(links.IFLA_VXLAN_ID, rtnl.U32.pack(4097))
    data += rtnl.attr(links.IFLA_VXLAN_PORT, b"\x12\xb5")
    info = rtnl.attr(links.IFLA_INFO_KIND, b"vxlan\0") + rtnl.attr(links.IFLA_INFO_DATA, data)
    body = rtnl.IFINFO.pack(0, 0, _INDEX, 1, 0) + rtnl.attr(links.IFLA_IFNAME, b"mnv1\0")
    body += rtnl.attr(links.IFLA_MTU, rtnl.U32.pack(1450)) + rtnl.attr(links.IFLA_ADDRESS, bytes(6))
    return datagram(rtnl.RTM_NEWLINK, body + rtnl.attr(links.IFLA_LINKINFO, info))


def _samples() -> list[bytes]:
    four, six, mac = bytes((10, 42, 1, 0)), b"\xfd" + bytes(15), bytes(6)
    found = [_link()]
    for address in (four, six):
        found += bulk.encode_neighbours(
            [_op(Table.NEIGHBOUR, NeighbourKey(_DEV, address), mac)], _INDICES, _SEQUENCE
        )
        found += bulk.encode_fdb([_op(Table.FDB, FdbKey(_DEV, mac), address)], _INDICES, _SEQUENCE)
        found += bulk.encode_nexthops(
            [_op(Table.NEXTHOP, NEXTHOP_ID_FIRST, Nexthop(_DEV, address))], _INDICES, _SEQUENCE
        )
        found += bulk.encode_routes(
            [
                _op(Table.ROUTE, RouteKey(address, 24), Route(NEXTHOP_ID_FIRST, address)),
                _op(Table.ROUTE, RouteKey(address, 25), Route(0, b"", Nexthop(_DEV, address))),
            ],
            _INDICES,
            _SEQUENCE,
        )
    for text in ("10.42.0.1/24", "fd00::1/64"):
        request = links.encode_address(ip_interface(text), _INDEX)
        found.append(datagram(request.kind, request.body))
    error = rtnl.NLMSGERR.pack(-errno.EEXIST) + datagram(0, b"")
    found += [
        datagram(rtnl.NLMSG_ERROR, error),
        datagram(rtnl.NLMSG_ERROR, bytes(20)),
        datagram(rtnl.NLMSG_DONE, bytes(4)),
        datagram(rtnl.RTM_NEWNETCONF, bytes(4) + rtnl.attr(1, rtnl.U32.pack(_INDEX))),
        datagram(10 << 8 | 2, bytes(4) + rtnl.attr(1, b"meshnet\0")),
    ]
    return found


SAMPLES = _samples()


def _make(random: Random) -> bytes:
    """A few messages, one of them damaged, and most often the end of a dump."""
    parts = [random.choice(SAMPLES) for _ in range(random.randrange(1, 5))]
    at = random.randrange(len(parts))
    parts[at] = damage_bytes(random, parts[at])
    if random.randrange(3):
        parts.append(SAMPLES[-3])
    return b"".join(parts)


class _Recorded:
    """A socket that answers whatever it is asked with one datagram, and then with nothing."""

    def __init__(self, answer: bytes) -> None:
        self._answers = [answer]

    def send(self, data: bytes) -> int:
        return len(data)

    def recv_into(self, buffer: memoryview) -> int:
        if not self._answers:
            raise BlockingIOError
        answer = self._answers.pop()[: len(buffer)]
        buffer[: len(answer)] = answer
        return len(answer)


class _Recording(rtnl.RtnlSocket):
    """`RtnlSocket` on a socket that is not one."""

    def __init__(self, answer: bytes) -> None:
        self._socket = _Recorded(answer)  # type: ignore[assignment]
        self._sequence = _SEQUENCE - 1
        self._buffer = memoryview(bytearray(65_536))


def check_answer(data: bytes) -> str:
    """Every request ends: with values that can be worked with, or with an `OSError`."""
    became = set()
    for ask in _ASK:
        try:
            ask(_Recording(data))
            became.add("read")
        except OSError as error:
            assert_clear(str(error))
            became.add("error")
    return " and ".join(sorted(became))


def _dump_links(source: rtnl.RtnlSocket) -> None:
    for body in source.dump(rtnl.RTM_GETLINK, b""):
        links.decode_link(body)


def _dump_addresses(source: rtnl.RtnlSocket) -> None:
    for found in links.decode_addresses(source.dump(rtnl.RTM_GETADDR, b"")):
        assert len(found.address) in (4, 16)


def _dump_neighbours(source: rtnl.RtnlSocket) -> None:
    bodies = source.dump(rtnl.RTM_GETNEIGH, b"")
    for key, mac in bulk.decode_neighbours(bodies, _DEV, _INDEX).items():
        bulk.encode_neighbours([_op(Table.NEIGHBOUR, key, None)], _INDICES, 1)
        assert len(mac) == 6
    for entry, remote in bulk.decode_fdb(bodies, _DEV, _INDEX).items():
        bulk.encode_fdb([_op(Table.FDB, entry, None)], _INDICES, 1)
        assert len(remote) in (4, 16)


def _dump_routes(source: rtnl.RtnlSocket) -> None:
    for key in bulk.decode_routes(source.dump(rtnl.RTM_GETROUTE, b""), _NAMES):
        bulk.encode_routes([_op(Table.ROUTE, key, None)], _INDICES, 1)


def _dump_nexthops(source: rtnl.RtnlSocket) -> None:
    nexthops, _ = bulk.decode_nexthops(source.dump(rtnl.RTM_GETNEXTHOP, b""), _NAMES)
    for nexthop in nexthops.values():
        assert len(nexthop.gateway) in (4, 16)


def _send(source: rtnl.RtnlSocket) -> None:
    for index, error in source.send_packed([SAMPLES[1], SAMPLES[2]]).items():
        assert index in (0, 1)
        assert str(error)


def _look_up(source: rtnl.RtnlSocket) -> None:
    for answer in source.ask([SAMPLES[1]]):
        if isinstance(answer, bytes):
            route_lookups.decode_route_lookup(answer)
        else:
            assert str(answer)


_ASK = (
    *(_dump_links, _dump_addresses, _dump_neighbours, _dump_routes, _dump_nexthops),
    *(_send, _look_up),
)


def check_notification(data: bytes) -> str:
    """A notification concerns us or not."""
    events = EventFilter()
    events.look_at({_INDEX}, {_INDEX + 1}, {_INDEX + 2})
    concerned = events.concerns_us(data) or nftables_concerns_us(data)
    return "concerns us" if concerned else "ignored"


def _make_notification(random: Random) -> bytes:
    if random.randrange(10) == 0:
        return struct.pack("=IHHII", 16 + 40, random.randrange(130), 0, 1, 0) + random.randbytes(40)
    return damage_bytes(random, random.choice(SAMPLES))


ANSWERS = Campaign("answers", _make, plain(check_answer), 900)
NOTIFICATIONS = Campaign("notifications", _make_notification, plain(check_notification), 3000)
