"""What the kernel tells of its own accord, filtered to what concerns us.

Our own writes come back as notifications: programming 10,000 hosts makes 50,000 of them, more than
a socket's buffer holds.  So the kernel itself drops them, by a socket filter: those that name one
of our sockets as their cause, and, since VXLAN devices name none, those that tell of an FDB entry
that was set with the mark of ours (`bulk.NTF_EXT_LEARNED`).  What comes is what others did, and
deletions of our own FDB entries and neighbours, and loads of our rules, which ``nft`` does for us.

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
    from collections.abc import Callable, Collection, Container

RTNLGRP_LINK, RTNLGRP_NEIGH = 1, 3
RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE = 5, 7
RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE = 9, 11
RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF, RTNLGRP_NEXTHOP = 24, 25, 32
NFNLGRP_NFTABLES = 7
NETLINK_ADD_MEMBERSHIP = 1
NFT_MSG_NEWGEN = 15
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


def open_route_events(own_ports: Collection[int]) -> socket.socket:
    """A socket that receives rtnetlink notifications of the calling thread's namespace.

    Args:
        own_ports: netlink addresses of the sockets we write through: what they cause is dropped.
    """
    return _open(socket.NETLINK_ROUTE, _GROUPS, own_ports)


def open_nftables_events(own_ports: Collection[int]) -> socket.socket:
    """A socket that receives nf_tables notifications of the calling thread's namespace.

    Args:
        own_ports: as of `open_route_events`, but of sockets for nftables.
    """
    return _open(NETLINK_NETFILTER, (NFNLGRP_NFTABLES,), own_ports)


def _open(protocol: int, groups: Collection[int], own_ports: Collection[int]) -> socket.socket:
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    try:
        rtnl.set_receive_buffer(events, _RECEIVE_BUFFER_BYTES)
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
    *((LOAD_U8, 0, 0, 16), (IF_EQUAL, 0, 3, bulk.AF_BRIDGE)),  # ndm_family
    *((LOAD_U8, 0, 0, 26), (IF_BITS, 0, 1, bulk.NTF_EXT_LEARNED)),  # ndm_flags
    (RETURN, 0, 0, 0),
)
"""Steps that drop an FDB entry that was set with the mark of ours."""


def _drop_own(
    events: socket.socket, own_ports: Collection[int], more: Collection[tuple[int, int, int, int]]
) -> None:
    """Attach a classic BPF program to a netlink socket, as zebra does (``netlink_install_filter``).

    A notification is one message, or those of one sender.  The program loads big-endian, messages
    are in host byte order.
    """
    program = [(LOAD_U32, 0, 0, 12)]  # nlmsg_pid
    for port in own_ports:
        program += [(IF_EQUAL, 0, 1, socket.htonl(port)), (RETURN, 0, 0, 0)]
    attach_filter(events, [*program, *more, (RETURN, 0, 0, EVERYTHING)])


_LINK_LOOKS = (links.IFLA_IFNAME, links.IFLA_MTU, links.IFLA_ADDRESS, links.IFLA_MASTER)

NeighbourId = tuple[int, int, bytes]
"""Family, ifindex, and the address of a neighbour or the MAC of an FDB entry."""


def neighbour_id(message: rtnl.Message) -> NeighbourId:
    """What names the neighbour or FDB entry that a message is about."""
    family, ifindex, *_ = rtnl.NDMSG.unpack_from(message.data, message.start)
    attrs = rtnl.parse_attrs(message.data, message.start + 12, message.end)
    key = bulk.NDA_LLADDR if family == bulk.AF_BRIDGE else bulk.NDA_DST
    return family, ifindex, attrs.get(key, b"")


class EventFilter:
    """Says whether a notification may mean that the kernel differs from what we want.

    Which links are ours and which are the underlay's is told by `look_at` after every pass; one of
    ours that appears in between is known by its name.

    Args:
        deleted: neighbours and FDB entries that we do not want any more, as `neighbour_id` names
            them: the kernel tells of their end without saying that it was our doing.
        expects_endpoint: whether an endpoint's link of that name should be there.
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
        self._awaited: set[str] = set()

    def look_at(
        self,
        bridges: Collection[int],
        tunnels: Collection[int],
        underlay_links: Collection[int],
        awaited: Collection[str] = (),
    ) -> None:
        """Name the links whose notifications matter, by ifindex.

        Args:
            awaited: names of links that matter if they appear.
        """
        self._own_links = {*bridges, *tunnels}
        self._tunnels = set(tunnels)
        self._underlay_links = set(underlay_links)
        self._awaited = set(awaited)
        known = self._own_links | self._underlay_links
        self._looks = {i: looks for i, looks in self._looks.items() if i in known}

    def concerns_us(self, data: bytes) -> bool:
        """Whether any rtnetlink message of a datagram does; one that cannot be read may."""
        try:
            return any(self._one(message) for message in rtnl.split_messages(data))
        except struct.error:
            return True

    def _one(self, message: rtnl.Message) -> bool:
        match message.kind:
            case rtnl.RTM_NEWLINK | rtnl.RTM_DELLINK:
                return self._link(message)
            case rtnl.RTM_NEWADDR | rtnl.RTM_DELADDR:
                index = rtnl.IFADDR.unpack_from(message.data, message.start)[4]
                return index in self._own_links or index in self._underlay_links
            case rtnl.RTM_NEWNEIGH | rtnl.RTM_DELNEIGH:
                return self._neighbour(message)
            case rtnl.RTM_NEWROUTE | rtnl.RTM_DELROUTE:
                return self._route(message)
            case rtnl.RTM_NEWNEXTHOP | rtnl.RTM_DELNEXTHOP:
                return self._nexthop(message)
            case rtnl.RTM_NEWNETCONF:  # a sysctl of a link changed
                attrs = rtnl.parse_attrs(message.data, message.start + 4, message.end)
                index = rtnl.U32.unpack(attrs.get(NETCONFA_IFINDEX, bytes(4)))[0]
                return index in self._own_links or index in self._underlay_links
            case _:
                return False

    def _link(self, message: rtnl.Message) -> bool:
        _, _, index, flags, _ = rtnl.IFINFO.unpack_from(message.data, message.start)
        attrs = rtnl.parse_attrs(message.data, message.start + 16, message.end)
        if index in self._own_links or index in self._underlay_links:
            # A bridge tells of every port that comes or goes; that it is as it was is no news.
            # A TUN without its process has no carrier; without its carrier the underlay has none
            # of our nexthops, and Linux does not say so.  A bridge's follows its ports.
            carries = index in self._tunnels or index in self._underlay_links
            state = links.IFF_UP | (links.IFF_LOWER_UP | links.IFF_RUNNING if carries else 0)
            kind = attrs.get(links.IFLA_LINKINFO) if index in self._tunnels else None
            looks = (flags & state, kind, *map(attrs.get, _LINK_LOOKS))
            before = self._looks.get(index)
            self._looks[index] = looks
            return message.kind == rtnl.RTM_DELLINK or looks != before
        name = attrs.get(links.IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace")
        # Endpoint links are made by the dozen; only their end, that they are down, or their leaving
        # the bridge (a RTM_DELLINK of family AF_BRIDGE), can be somebody else's doing.
        if ENDPOINT_LINK.fullmatch(name):
            ends = message.kind == rtnl.RTM_DELLINK or not flags & links.IFF_UP
            return ends and self.expects_endpoint(name)
        return name in self._awaited or bool(NETWORK_LINK.fullmatch(name))

    def _neighbour(self, message: rtnl.Message) -> bool:
        # Those on a bridge are endpoints, which the host resolves by itself.
        if rtnl.NDMSG.unpack_from(message.data, message.start)[1] not in self._tunnels:
            return False
        return message.kind == rtnl.RTM_NEWNEIGH or neighbour_id(message) not in self._deleted

    def _route(self, message: rtnl.Message) -> bool:
        header = rtnl.RTMSG.unpack_from(message.data, message.start)
        if header[4] != bulk.RT_TABLE_MAIN:
            return False
        if header[5] == ROUTE_PROTOCOL:
            return True
        # Another route through a link of ours or of the underlay may hide one of ours, or be the
        # new way to a peer.
        attrs = rtnl.parse_attrs(message.data, message.start + 12, message.end)
        index = rtnl.U32.unpack(attrs.get(bulk.RTA_OIF, bytes(4)))[0]
        return index in self._own_links or index in self._underlay_links

    def _nexthop(self, message: rtnl.Message) -> bool:
        attrs = rtnl.parse_attrs(message.data, message.start + 8, message.end)
        nexthop_id = rtnl.U32.unpack(attrs.get(bulk.NHA_ID, bytes(4)))[0]
        return bool(NEXTHOP_ID_FIRST <= nexthop_id <= NEXTHOP_ID_LAST)


def nftables_concerns_us(data: bytes) -> bool:
    """Whether any nf_tables message of a datagram is about a table of ours."""
    for message in rtnl.split_messages(data):
        subsystem, kind = message.kind >> 8, message.kind & 0xFF
        if subsystem != NFNL_SUBSYS_NFTABLES or kind == NFT_MSG_NEWGEN:
            continue
        attrs = rtnl.parse_attrs(message.data, message.start + 4, message.end)
        # Attribute 1 is the table's name in every message kind of nf_tables.
        if attrs.get(NFTA_TABLE_NAME, b"").rstrip(b"\0") == TABLE.encode():
            return True
    return False
