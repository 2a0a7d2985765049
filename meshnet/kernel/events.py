"""The kernel's notifications, filtered to those that concern us.

Our own writes come back as notifications: programming 10,000 hosts makes 50,000 of them, more than
a socket's buffer holds.  So a socket filter has the kernel drop them: those that name one of our
sockets as their cause and, since VXLAN devices name none, those of FDB entries that were set with
our mark (`bulk.NTF_EXT_LEARNED`).  What remains is what others did, the deletions of our own FDB
entries and neighbours, and loads of our rules, which ``nft`` does for us.

linux/rtnetlink.h (multicast groups), linux/netfilter/nfnetlink.h and nf_tables.h; linux/filter.h.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from meshnet.firewall.elements import TABLE
from meshnet.kernel.wire import bulk, links, rtnl
from meshnet.kernel.wire.bpf import (
    EVERYTHING,
    IF_BITS,
    IF_EQUAL,
    LOAD_U8,
    LOAD_U16,
    LOAD_U32,
    RETURN,
    attach_filter,
)
from meshnet.kernel.wire.nftnl import NETLINK_NETFILTER, NFNL_SUBSYS_NFTABLES
from meshnet.state import (
    ENDPOINT_LINK,
    NETWORK_LINK,
    NEXTHOP_ID_FIRST,
    NEXTHOP_ID_LAST,
    ROUTE_PROTOCOL,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Iterator

    from meshnet.backends.occupied import Span

RTNLGRP_LINK, RTNLGRP_NEIGH = 1, 3
RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE = 5, 7
RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE = 9, 11
RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF, RTNLGRP_NEXTHOP = 24, 25, 32
NFNLGRP_NFTABLES = 7
NETLINK_ADD_MEMBERSHIP = 1
NFT_MSG_NEWGEN = 15
_RULES = range(9)
"""Kinds of messages that are about tables, chains and rules (``enum nf_tables_msg_types``)."""
NFTA_TABLE_NAME = 1
NETCONFA_IFINDEX = 1

_GROUPS = (
    RTNLGRP_LINK,
    RTNLGRP_NEIGH,
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV6_ROUTE,
    RTNLGRP_IPV4_NETCONF,
    RTNLGRP_IPV6_NETCONF,
    RTNLGRP_NEXTHOP,
)
_RECEIVE_BUFFER_BYTES = 8 << 20
"""If it overflows, the kernel drops notifications, and only a pass over everything helps."""


def open_route_events(own_ports: Collection[int]) -> socket.socket:
    """A socket that receives rtnetlink notifications of the calling thread's namespace.

    Args:
        own_ports: netlink addresses of the sockets we write through: what they cause is dropped.
    """
    return _open(socket.NETLINK_ROUTE, _GROUPS, own_ports)


def open_nftables_events(own_ports: Collection[int]) -> socket.socket:
    """A socket that receives nf_tables notifications of the calling thread's namespace.

    Args:
        own_ports: as of `open_route_events`, but of nftables sockets.
    """
    return _open(NETLINK_NETFILTER, (NFNLGRP_NFTABLES,), own_ports)


def _open(protocol: int, groups: Collection[int], own_ports: Collection[int]) -> socket.socket:
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    try:
        rtnl.set_receive_buffer(events, _RECEIVE_BUFFER_BYTES)
        # Before it joins a group: nothing must come in unfiltered.
        _drop_own(events, own_ports, _FDB_OF_OURS if protocol == socket.NETLINK_ROUTE else ())
        events.bind((0, 0))
        for group in groups:
            events.setsockopt(rtnl.SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    except BaseException:
        events.close()
        raise
    return events


_FDB_OF_OURS = (
    *((LOAD_U16, 0, 0, 4), (IF_EQUAL, 0, 5, socket.htons(rtnl.RTM_NEWNEIGH))),  # nlmsg_type
    *((LOAD_U8, 0, 0, 16), (IF_EQUAL, 0, 3, rtnl.AF_BRIDGE)),  # ndm_family
    *((LOAD_U8, 0, 0, 26), (IF_BITS, 0, 1, bulk.NTF_EXT_LEARNED)),  # ndm_flags
    (RETURN, 0, 0, 0),
)
"""Steps that drop notifications of FDB entries that were set with our mark."""


def _drop_own(
    events: socket.socket, own_ports: Collection[int], more: Collection[tuple[int, int, int, int]]
) -> None:
    """Attach a classic BPF program to a netlink socket, as zebra does (``netlink_install_filter``).

    A datagram is one notification, or several of one sender, so its first header tells.  The
    program loads big-endian, but messages are in host byte order: hence ``htons`` and ``htonl``.
    """
    program = [(LOAD_U32, 0, 0, 12)]  # nlmsg_pid
    for port in own_ports:
        program += [(IF_EQUAL, 0, 1, socket.htonl(port)), (RETURN, 0, 0, 0)]
    attach_filter(events, [*program, *more, (RETURN, 0, 0, EVERYTHING)])


_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_LINK_LOOKS = (links.IFLA_IFNAME, links.IFLA_MTU, links.IFLA_ADDRESS, links.IFLA_MASTER)

NeighbourId = tuple[int, int, bytes]
"""Family, ifindex, and the address of a neighbour or the MAC of an FDB entry."""


def neighbour_id(message: rtnl.Message) -> NeighbourId:
    """Identifies the neighbour or FDB entry that a message is about."""
    family, ifindex, *_ = rtnl.NDMSG.unpack_from(message.data, message.start)
    attrs = rtnl.parse_attrs(message.data, message.start + 12, message.end)
    key = bulk.NDA_LLADDR if family == rtnl.AF_BRIDGE else bulk.NDA_DST
    return family, ifindex, attrs.get(key, b"")


class EventFilter:
    """Says whether a notification may mean that the kernel differs from what we want.

    After every pass `look_at` says which links are ours and which are the underlay's; one of ours
    that appears in between is recognised by its name.

    Args:
        deleted: neighbours and FDB entries that we no longer want, as `neighbour_id` identifies
            them: the kernel does not say that their end was our doing.
        expects_endpoint: whether an endpoint's link of that name should exist.
    """

    def __init__(
        self,
        deleted: Container[NeighbourId] = frozenset(),
        expects_endpoint: Callable[[str], bool] = lambda _name: True,
    ) -> None:
        self.expects_endpoint = expects_endpoint
        self._deleted = deleted
        self._own_links: set[int] = set()
        self._tunnels: set[int] = set()
        self._looks: dict[int, tuple[object, ...]] = {}
        self._underlay_links: set[int] = set()
        self._host_links: set[int] = set()
        self._awaited: set[str] = set()
        self._spans: list[tuple[int, int, int]] = []

    def look_at(
        self,
        bridges: Collection[int],
        tunnels: Collection[int],
        underlay_links: Collection[int],
        host_links: Collection[int] = (),
        awaited: Collection[str] = (),
        spans: Collection[Span] = (),
    ) -> None:
        """Name the links whose notifications matter, by ifindex.

        Args:
            host_links: links of the host of which only settings matter; others than these that come
                up or get an address matter, too.
            awaited: names of links that matter if they appear.
            spans: the addresses of networks, in which anybody's addresses and routes matter.
        """
        self._own_links = {*bridges, *tunnels}
        self._tunnels = set(tunnels)
        self._underlay_links = set(underlay_links)
        self._host_links = set(host_links)
        self._awaited = set(awaited)
        self._spans = [(_FAMILIES[s.version], s.first, s.last) for s in spans]
        known = self._own_links | self._underlay_links
        self._looks = {i: looks for i, looks in self._looks.items() if i in known}

    def concerns_us(self, data: bytes) -> bool:
        """Whether any rtnetlink message of a datagram may; an unreadable one may, too."""
        try:
            return any(self._one(message) for message in rtnl.split_messages(data))
        except struct.error:
            return True

    def _one(self, message: rtnl.Message) -> bool:
        match message.kind:
            case rtnl.RTM_NEWLINK | rtnl.RTM_DELLINK:
                return self._link(message)
            case rtnl.RTM_NEWADDR | rtnl.RTM_DELADDR:
                return self._address(message)
            case rtnl.RTM_NEWNEIGH | rtnl.RTM_DELNEIGH:
                return self._neighbour(message)
            case rtnl.RTM_NEWROUTE | rtnl.RTM_DELROUTE:
                return self._route(message)
            case rtnl.RTM_NEWNEXTHOP | rtnl.RTM_DELNEXTHOP:
                return self._nexthop(message)
            case rtnl.RTM_NEWNETCONF:  # a sysctl of a link changed
                attrs = rtnl.parse_attrs(message.data, message.start + 4, message.end)
                index = rtnl.U32.unpack(attrs.get(NETCONFA_IFINDEX, bytes(4)))[0]
                return any(
                    index in links
                    for links in (self._own_links, self._underlay_links, self._host_links)
                )
            case _:
                return False

    def _link(self, message: rtnl.Message) -> bool:
        _, _, index, flags, _ = rtnl.IFINFO.unpack_from(message.data, message.start)
        attrs = rtnl.parse_attrs(message.data, message.start + 16, message.end)
        if index in self._own_links or index in self._underlay_links:
            # A bridge tells of every port that comes or goes; if it looks as before, that is not
            # news.  The carrier matters of two kinds of link.  A TUN whose process has ended has
            # none.  From an underlay link that loses it the kernel removes our nexthops, and does
            # not tell.  A bridge's carrier merely follows its ports.
            carries = index in self._tunnels or index in self._underlay_links
            state = links.IFF_UP | (links.IFF_LOWER_UP | links.IFF_RUNNING if carries else 0)
            kind = attrs.get(links.IFLA_LINKINFO) if index in self._tunnels else None
            looks = (flags & state, kind, *map(attrs.get, _LINK_LOOKS))
            before = self._looks.get(index)
            self._looks[index] = looks
            return message.kind == rtnl.RTM_DELLINK or looks != before
        name = attrs.get(links.IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace")
        # The agent itself makes endpoint links, by the dozen, so their coming is not news.  That
        # one ends, is down, or leaves the bridge (a RTM_DELLINK of family AF_BRIDGE) may be
        # somebody else's doing.
        if ENDPOINT_LINK.fullmatch(name):
            ends = message.kind == rtnl.RTM_DELLINK or not flags & links.IFF_UP
            return ends and self.expects_endpoint(name)
        if name in self._awaited or NETWORK_LINK.fullmatch(name):
            return True
        # A port's packets come by its master.
        stands_alone = flags & links.IFF_UP and links.IFLA_MASTER not in attrs
        return (
            message.kind == rtnl.RTM_NEWLINK
            and bool(stands_alone)
            and index not in self._host_links
        )

    def _address(self, message: rtnl.Message) -> bool:
        family, length, _, scope, index = rtnl.IFADDR.unpack_from(message.data, message.start)
        if index in self._own_links or index in self._underlay_links:
            return True
        is_new = index not in self._host_links and scope == rtnl.RT_SCOPE_UNIVERSE
        if is_new and message.kind == rtnl.RTM_NEWADDR:
            return True
        if not self._spans:
            return False
        attrs = rtnl.parse_attrs(message.data, message.start + rtnl.IFADDR.size, message.end)
        return self._meets_networks(family, attrs.get(links.IFA_ADDRESS, b""), length)

    def _meets_networks(self, family: int, prefix: bytes, length: int) -> bool:
        """Whether a prefix has an address in common with a network."""
        first = int.from_bytes(prefix, "big")
        last = first | (1 << max(0, len(prefix) * 8 - length)) - 1
        return any(f == family and low <= last and first <= high for f, low, high in self._spans)

    def _neighbour(self, message: rtnl.Message) -> bool:
        # Neighbours on a bridge are endpoints, which the kernel resolves by itself.
        if rtnl.NDMSG.unpack_from(message.data, message.start)[1] not in self._tunnels:
            return False
        return message.kind == rtnl.RTM_NEWNEIGH or neighbour_id(message) not in self._deleted

    def _route(self, message: rtnl.Message) -> bool:
        header = rtnl.RTMSG.unpack_from(message.data, message.start)
        if header[4] != bulk.RT_TABLE_MAIN:
            return False
        if header[5] == ROUTE_PROTOCOL:
            return True
        # Somebody else's route through our links or the underlay's may hide one of ours, or be the
        # new path to a peer.  A default route may be the new way outside, with another gateway, and
        # one into a network is in our way.  All others, of which there may be a million, are not
        # news.
        if not header[1]:
            return True
        attrs = rtnl.parse_attrs(message.data, message.start + 12, message.end)
        index = rtnl.U32.unpack(attrs.get(bulk.RTA_OIF, bytes(4)))[0]
        if index in self._own_links or index in self._underlay_links:
            return True
        return self._meets_networks(header[0], attrs.get(bulk.RTA_DST, b""), header[1])

    def _nexthop(self, message: rtnl.Message) -> bool:
        attrs = rtnl.parse_attrs(message.data, message.start + 8, message.end)
        nexthop_id = rtnl.U32.unpack(attrs.get(bulk.NHA_ID, bytes(4)))[0]
        return bool(NEXTHOP_ID_FIRST <= nexthop_id <= NEXTHOP_ID_LAST)


def nftables_concerns_us(data: bytes) -> bool:
    """Whether any nf_tables message of a datagram is about a table of ours."""
    return any(is_ours for is_ours, _ in _nftables_messages(data))


def others_rules_changed(data: bytes) -> bool:
    """Whether any nf_tables message of a datagram is about a chain or rule of somebody else."""
    return any(not is_ours and kind in _RULES for is_ours, kind in _nftables_messages(data))


def _nftables_messages(data: bytes) -> Iterator[tuple[bool, int]]:
    """Of each nf_tables message of a datagram, whether its table is ours, and its kind."""
    for message in rtnl.split_messages(data):
        subsystem, kind = message.kind >> 8, message.kind & 0xFF
        # NEWGEN follows every transaction, anybody's, and names no table.
        if subsystem != NFNL_SUBSYS_NFTABLES or kind == NFT_MSG_NEWGEN:
            continue
        attrs = rtnl.parse_attrs(message.data, message.start + 4, message.end)
        # Attribute 1 is the table's name in every message kind of nf_tables.
        yield attrs.get(NFTA_TABLE_NAME, b"").rstrip(b"\0") == TABLE.encode(), kind
