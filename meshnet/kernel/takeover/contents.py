"""What a link has that can move to another: addresses, routes, nexthop objects, neighbours.

Each is kept as the kernel's own message, header and attributes, without what names the link.  So
attributes that meshnet does not know (metrics, encapsulations, lifetimes) move along, and objects
on two links can be compared.  Host byte order; linux/if_addr.h, linux/rtnetlink.h, linux/nexthop.h,
linux/neighbour.h.

Pure: imports no I/O.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from ipaddress import ip_address
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, NamedTuple

from meshnet.kernel.wire import links, rtnl
from meshnet.kernel.wire.bulk import (
    NDA_DST,
    NDA_LLADDR,
    NHA_ID,
    NHA_OIF,
    NUD_PERMANENT,
    RT_TABLE_MAIN,
    RTA_DST,
    RTA_GATEWAY,
    RTA_NH_ID,
    RTA_OIF,
    RTA_PRIORITY,
    RTA_TABLE,
    RTNH_F_ONLINK,
)
from meshnet.kernel.wire.host_routes import RTA_MULTIPATH
from meshnet.state import ROUTE_PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from meshnet.kernel.wire.rtnl import Body
    from meshnet.model import IpAddress

IFA_LABEL, IFA_CACHEINFO, IFA_RT_PRIORITY = 3, 6, 9
IFA_F_SECONDARY, IFA_F_DADFAILED, IFA_F_TENTATIVE, IFA_F_PERMANENT = 0x01, 0x08, 0x40, 0x80
IFA_F_TEMPORARY = IFA_F_SECONDARY
"""The same bit; its meaning for IPv6."""
IFA_F_DEPRECATED, IFA_F_NOPREFIXROUTE, IFA_F_STABLE_PRIVACY = 0x20, 0x200, 0x800
_KERNELS_FLAGS = (
    IFA_F_SECONDARY | IFA_F_TENTATIVE | IFA_F_PERMANENT | IFA_F_DEPRECATED | IFA_F_STABLE_PRIVACY
)
"""Flags that only the kernel sets: left out, so that an address compares equal on both links."""
RTA_CACHEINFO, RTA_EXPIRES = 12, 23
# USER_HZ: the kernel reports a lifetime in hundredths of a second, but takes it in seconds.
_CACHEINFO_EXPIRES_AT, _CLOCK_HZ = 8, 100
RTPROT_KERNEL, RT_TABLE_LOCAL = 2, 255
NDA_CACHEINFO, NDA_PROBES = 3, 4
NUD_REACHABLE, NUD_STALE, NUD_DELAY, NUD_PROBE = 0x02, 0x04, 0x08, 0x10
NTF_PROXY = 0x08
_USABLE = NUD_REACHABLE | NUD_STALE | NUD_DELAY | NUD_PROBE | NUD_PERMANENT
_IPV6_PREFIX_METRIC = 256
"""IP6_RT_PRIO_ADDRCONF."""
_LABEL_MOST = 15
_RTNEXTHOP = struct.Struct("=HBxI")  # length, flags, hops, ifindex


class Kind(IntEnum):
    """The kinds of objects that move."""

    ADDRESS = 1
    NEIGHBOUR = 2
    NEXTHOP = 3
    ROUTE = 4


class LinkObject(NamedTuple):
    """An object on a link: its message without what names the link.

    Attributes:
        attrs: type and payload, in the kernel's order.
    """

    kind: Kind
    header: bytes
    attrs: tuple[tuple[int, bytes], ...]

    def get(self, kind: int) -> bytes:
        """Payload of an attribute; b"" if it is missing."""
        return dict(self.attrs).get(kind, b"")

    def with_attr(self, kind: int, payload: bytes) -> LinkObject:
        """The same object with another payload for an attribute."""
        others = tuple(a for a in self.attrs if a[0] != kind)
        return self._replace(attrs=(*others, (kind, payload)))

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6."""
        return self.header[0]

    @property
    def address(self) -> IpAddress:
        """The IP address of an address or a neighbour."""
        if self.kind is Kind.NEIGHBOUR:
            return ip_address(self.get(NDA_DST))
        return ip_address(self.get(links.IFA_LOCAL) or self.get(links.IFA_ADDRESS))

    @property
    def flags(self) -> int:
        """Of an address: IFA_F_…."""
        return to_number(self.get(links.IFA_FLAGS))

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two objects that differ only in what the clock changes."""
        volatile = {Kind.ADDRESS: IFA_CACHEINFO, Kind.ROUTE: RTA_EXPIRES}.get(self.kind)
        return self.kind, self.header, tuple(sorted(a for a in self.attrs if a[0] != volatile))

    def __str__(self) -> str:
        match self.kind:
            case Kind.ADDRESS:
                return f"address {self.address}/{self.header[1]}"
            case Kind.NEIGHBOUR:
                return f"neighbour {self.address}"
            case Kind.NEXTHOP:
                return f"nexthop object {to_number(self.get(NHA_ID))}"
            case _:
                to = f"{ip_address(d)}/{self.header[1]}" if (d := self.get(RTA_DST)) else "default"
                return f"route {to} of table {_table(self)}"


class _Way(NamedTuple):
    """One nexthop of a route that has several (``struct rtnexthop``)."""

    ifindex: int
    flags: int
    attrs: tuple[tuple[int, bytes], ...]


class Contents(NamedTuple):
    """All that moves, in the kernel's order."""

    addresses: tuple[LinkObject, ...] = ()
    neighbours: tuple[LinkObject, ...] = ()
    nexthops: tuple[LinkObject, ...] = ()
    routes: tuple[LinkObject, ...] = ()

    @property
    def own_routes(self) -> tuple[LinkObject, ...]:
        """Its routes, without those that the kernel makes and removes with an address."""
        implied = {_implied_route(a) for a in self.addresses}
        return tuple(
            r for r in self.routes if r.header[5] != RTPROT_KERNEL or _destination(r) not in implied
        )

    @property
    def lasting(self) -> tuple[object, ...]:
        """What must be the same after a move: everything but learned neighbours and lifetimes."""
        return (
            tuple(a.identity for a in self.addresses),
            tuple(n.identity for n in self.nexthops),
            sorted(r.identity for r in self.routes),
        )

    @property
    def gateways(self) -> tuple[IpAddress, ...]:
        """Gateways of its default routes in the main table."""
        found = [
            ip_address(r.get(RTA_GATEWAY))
            for r in self.routes
            if not r.header[1] and _table(r) == RT_TABLE_MAIN and r.get(RTA_GATEWAY)
        ]
        return tuple(dict.fromkeys(found))


def decode_addresses(bodies: Iterable[Body], index: int, name: str) -> tuple[LinkObject, ...]:
    """The addresses of a link, from a dump of all."""
    found = []
    for data, start, end in bodies:
        family, length, _, scope, on = rtnl.IFADDR.unpack_from(data, start)
        if on != index or family not in (AF_INET, AF_INET6):
            continue
        attrs = []
        for kind, payload in _attrs(data, start + 8, end):
            kept = payload
            if kind == links.IFA_FLAGS:
                kept = rtnl.U32.pack(to_number(payload) & ~_KERNELS_FLAGS)
            elif kind == IFA_LABEL:
                kept = _cut_label(payload, name)
            elif kind == IFA_CACHEINFO:
                kept = payload[:8] + bytes(8)  # lifetimes, without the times of creation and change
            attrs.append((kind, kept))
        header = rtnl.IFADDR.pack(family, length, 0, scope, 0)
        found.append(LinkObject(Kind.ADDRESS, header, tuple(attrs)))
    return tuple(found)


def is_tentative(body: Body, index: int) -> bool:
    """Whether an address of a dump is on the link and still in duplicate address detection."""
    data, start, end = body
    family, _, _, _, on = rtnl.IFADDR.unpack_from(data, start)
    flags = to_number(dict(_attrs(data, start + 8, end)).get(links.IFA_FLAGS, b""))
    tentative = bool(flags & IFA_F_TENTATIVE) and not flags & IFA_F_DADFAILED
    return on == index and family == AF_INET6 and tentative


def unmovable_address(body: Body, index: int) -> str | None:
    """Why an address of a dump cannot be moved; None: it can, or it is on another link."""
    data, start, end = body
    family, length, _, _, on = rtnl.IFADDR.unpack_from(data, start)
    attrs = dict(_attrs(data, start + 8, end))
    flags = to_number(attrs.get(links.IFA_FLAGS, b""))
    if on != index or family != AF_INET6:
        return None
    text = f"address {ip_address(attrs[links.IFA_ADDRESS])}/{length}"
    if flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED):
        return f"{text} did not pass duplicate address detection: remove it"
    if flags & IFA_F_TEMPORARY:
        return f"{text} is temporary, and only the kernel can make such: set use_tempaddr to 0"
    return None


def decode_routes(bodies: Iterable[Body], index: int) -> tuple[LinkObject, ...]:
    """The routes by a link, from a dump of all tables of an IP version.

    Left out are the kernel's own in the local table; those by a nexthop object, which follow it;
    and meshnet's, which follow with the next pass.  IPv6 routes with the same destination and
    metric are one route with several nexthops to the kernel: here each is a route.
    """
    found = []
    for data, start, end in bodies:
        family, dst, src, tos, table, protocol, scope, kind, flags = rtnl.RTMSG.unpack_from(
            data, start
        )
        attrs = _attrs(data, start + 12, end)
        by_type = dict(attrs)
        kernels = protocol == RTPROT_KERNEL and table == RT_TABLE_LOCAL
        if kernels or protocol == ROUTE_PROTOCOL or RTA_NH_ID in by_type:
            continue
        if RTA_MULTIPATH in by_type and family == AF_INET6:
            hop = next((h for h in _next_hops(by_type[RTA_MULTIPATH]) if h.ifindex == index), None)
            if hop is None:
                continue
            flags = hop.flags
            attrs = [a for a in attrs if a[0] != RTA_MULTIPATH] + list(hop.attrs)
        elif to_number(by_type.get(RTA_OIF, b"")) != index:
            continue
        expires = by_type.get(RTA_CACHEINFO, b"")[_CACHEINFO_EXPIRES_AT:][:4]
        kept = [a for a in attrs if a[0] not in (RTA_OIF, RTA_CACHEINFO)]
        if family == AF_INET6 and (ticks := to_number(expires)):
            kept.append((RTA_EXPIRES, rtnl.U32.pack(max(1, ticks // _CLOCK_HZ))))
        header = rtnl.RTMSG.pack(
            family, dst, src, tos, table, protocol, scope, kind, flags & RTNH_F_ONLINK
        )
        found.append(LinkObject(Kind.ROUTE, header, tuple(kept)))
    return tuple(found)


def multipath_over(bodies: Iterable[Body], index: int) -> list[str]:
    """Routes that share their packets between the link and others, in words."""
    found = []
    for data, start, end in bodies:
        attrs = _attrs(data, start + 12, end)
        if any(w.ifindex == index for w in _next_hops(dict(attrs).get(RTA_MULTIPATH, b""))):
            header = bytes(data[start : start + 12])
            found.append(str(LinkObject(Kind.ROUTE, header, tuple(attrs))))
    return found


def decode_nexthops(bodies: Iterable[Body], index: int) -> tuple[LinkObject, ...]:
    """The nexthop objects on a link, whoever made them."""
    found = []
    for data, start, end in bodies:
        family, _, protocol, flags = rtnl.NHMSG.unpack_from(data, start)
        attrs = _attrs(data, start + 8, end)
        if to_number(dict(attrs).get(NHA_OIF, b"")) == index:
            header = rtnl.NHMSG.pack(family, 0, protocol, flags & RTNH_F_ONLINK)
            kept = tuple(a for a in attrs if a[0] != NHA_OIF)
            found.append(LinkObject(Kind.NEXTHOP, header, kept))
    return tuple(found)


def decode_neighbours(bodies: Iterable[Body], index: int) -> tuple[LinkObject, ...]:
    """The neighbours of a link that packets can be sent to, and those it answers for (proxy).

    One that is not known to be reachable right now becomes stale: used at once, and asked again.
    """
    found = []
    for data, start, end in bodies:
        family, on, state, flags, kind = rtnl.NDMSG.unpack_from(data, start)
        if on != index or family not in (AF_INET, AF_INET6):
            continue
        attrs = [
            a for a in _attrs(data, start + 12, end) if a[0] not in (NDA_CACHEINFO, NDA_PROBES)
        ]
        if not flags & NTF_PROXY:
            if not state & _USABLE or NDA_LLADDR not in dict(attrs):
                continue
            state = state if state & (NUD_PERMANENT | NUD_REACHABLE) else NUD_STALE
        header = rtnl.NDMSG.pack(family, 0, state, flags, kind)
        found.append(LinkObject(Kind.NEIGHBOUR, header, tuple(attrs)))
    return tuple(found)


def encode_body(moved: LinkObject, index: int, name: str) -> bytes:
    """The message again, for a link."""
    header, attrs = moved.header, list(moved.attrs)
    match moved.kind:
        case Kind.ADDRESS:
            header = header[:4] + rtnl.U32.pack(index)
            attrs = [(k, _join_label(p, name) if k == IFA_LABEL else p) for k, p in attrs]
        case Kind.NEIGHBOUR:
            header = header[:4] + rtnl.U32.pack(index) + header[8:]
        case Kind.NEXTHOP:
            attrs.append((NHA_OIF, rtnl.U32.pack(index)))
        case Kind.ROUTE:
            attrs.append((RTA_OIF, rtnl.U32.pack(index)))
    return header + b"".join(rtnl.attr(kind, payload) for kind, payload in attrs)


def _next_hops(multipath: bytes) -> Iterator[_Way]:
    at = 0
    while at + _RTNEXTHOP.size <= len(multipath):
        length, flags, ifindex = _RTNEXTHOP.unpack_from(multipath, at)
        attrs = _attrs(multipath, at + _RTNEXTHOP.size, at + length)
        yield _Way(ifindex, flags, tuple(attrs))
        at += max(_RTNEXTHOP.size, (length + 3) & ~3)


def _attrs(data: bytes, start: int, end: int) -> list[tuple[int, bytes]]:
    return list(rtnl.parse_attrs(data, start, end).items())


def _cut_label(payload: bytes, name: str) -> bytes:
    """A label such as ``eth0`` or ``eth0:1`` without the link's name."""
    label = payload.rstrip(b"\0").decode()
    head, colon, rest = label.partition(":")
    return (colon + rest if head == name else label).encode()


def _join_label(payload: bytes, name: str) -> bytes:
    label = payload.decode()
    if not label or label.startswith(":"):
        label = (name + label)[:_LABEL_MOST]
    return label.encode() + b"\0"


def _table(route: LinkObject) -> int:
    return to_number(route.get(RTA_TABLE)) or route.header[4]


def _destination(route: LinkObject) -> tuple[object, ...]:
    return _table(route), route.family, route.get(RTA_DST), route.header[1], _metric(route)


def _metric(route: LinkObject) -> int:
    return to_number(route.get(RTA_PRIORITY))


def _implied_route(address: LinkObject) -> tuple[object, ...] | None:
    """The route that the kernel makes to an address's prefix, as `_destination` gives it."""
    if address.flags & IFA_F_NOPREFIXROUTE:
        return None
    packed, length = address.get(links.IFA_ADDRESS), address.header[1]
    mask = (1 << 8 * len(packed)) - (1 << 8 * len(packed) - length)
    prefix = (int.from_bytes(packed, "big") & mask).to_bytes(len(packed), "big")
    metric = to_number(address.get(IFA_RT_PRIORITY))
    if address.family == AF_INET6:
        metric = metric or _IPV6_PREFIX_METRIC
    return RT_TABLE_MAIN, address.family, prefix, length, metric


def to_number(raw: bytes) -> int:
    """A number of four bytes in host byte order; 0 if it is missing or of another length."""
    return int(rtnl.U32.unpack(raw)[0]) if len(raw) == 4 else 0
