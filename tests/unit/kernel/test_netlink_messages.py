"""The bulk encoder and decoder: what is encoded is read back, and garbage does no harm."""

from __future__ import annotations

import struct
from ipaddress import ip_interface
from itertools import accumulate
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.kernel.wire import bulk, links, route_lookups, rtnl
from meshnet.state import (
    NEXTHOP_ID_FIRST,
    NEXTHOP_ID_LAST,
    ROUTE_PROTOCOL,
    FdbKey,
    LinkKind,
    NeighbourKey,
    Nexthop,
    Route,
    RouteKey,
    Vxlan,
)
from meshnet.tables import Op, Table
from tests.unit.messages import body_of, datagram, dumped, u32
from tests.unit.strategies import macs

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.kernel.wire.rtnl import Body

DEV, IFINDEX = "mnv1", 77
INDICES = {DEV: IFINDEX}
addresses = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)
nexthop_ids = st.integers(NEXTHOP_ID_FIRST, NEXTHOP_ID_LAST)


def set_op(table: Table, key: object, value: object, *, exists: bool = False) -> Op:
    return Op(table, key, value, exists)


def header(message: bytes) -> rtnl.Message:
    (found,) = rtnl.split_messages(message)
    return found


@given(addresses, macs)
def test_neighbours(address: bytes, mac: bytes) -> None:
    key = NeighbourKey(DEV, address)
    ops = [set_op(Table.NEIGHBOUR, key, mac), set_op(Table.NEIGHBOUR, key, None)]
    new, gone = bulk.encode_neighbours(ops, INDICES, 7)
    assert (header(new).kind, header(new).sequence) == (rtnl.RTM_NEWNEIGH, 7)
    assert bulk.decode_neighbours([dumped(new)], DEV, IFINDEX) == {key: mac}
    assert bulk.decode_neighbours([dumped(new)], DEV, IFINDEX + 1) == {}
    assert (header(gone).kind, header(gone).sequence) == (rtnl.RTM_DELNEIGH, 8)


@given(addresses, macs)
def test_fdb_entries(remote: bytes, mac: bytes) -> None:
    key = FdbKey(DEV, mac)
    ops = [set_op(Table.FDB, key, remote), set_op(Table.FDB, key, None)]
    new, gone = bulk.encode_fdb(ops, INDICES, 7)
    assert bulk.decode_fdb([dumped(new)], DEV, IFINDEX) == {key: remote}
    assert bulk.decode_fdb([dumped(new)], DEV, IFINDEX + 1) == {}
    assert (header(gone).kind, header(gone).sequence) == (rtnl.RTM_DELNEIGH, 8)


@given(nexthop_ids, addresses, st.booleans())
def test_nexthops(nexthop_id: int, gateway: bytes, exists: bool) -> None:
    nexthop = Nexthop(DEV, gateway)
    ops = [
        set_op(Table.NEXTHOP, nexthop_id, nexthop, exists=exists),
        set_op(Table.NEXTHOP, nexthop_id, None),
    ]
    new, gone = bulk.encode_nexthops(ops, INDICES, 7)
    assert bool(header(new).flags & rtnl.NLM_F_EXCL) != exists
    names = {IFINDEX: DEV}
    assert bulk.decode_nexthops([dumped(new)], names) == ({nexthop_id: nexthop}, set())
    assert (header(gone).kind, header(gone).sequence) == (rtnl.RTM_DELNEXTHOP, 8)


@given(
    prefix=addresses,
    length=st.integers(0, 32),
    nexthop_id=nexthop_ids | st.none(),
    gateway=st.none() | addresses,
    source=st.booleans(),
    exists=st.booleans(),
)
def test_routes(
    prefix: bytes,
    length: int,
    nexthop_id: int | None,
    gateway: bytes | None,
    source: bool,
    exists: bool,
) -> None:
    via = Nexthop(DEV, gateway) if gateway is not None and nexthop_id is None else None
    key, route = RouteKey(prefix, length), Route(nexthop_id or 0, prefix if source else b"", via)
    ops = [
        set_op(Table.ROUTE, key, route, exists=exists),
        set_op(Table.ROUTE, key, None),
    ]
    new, gone = bulk.encode_routes(ops, INDICES, 7)
    assert bool(header(new).flags & rtnl.NLM_F_EXCL) != exists
    assert bulk.decode_routes([dumped(new)], {IFINDEX: DEV}) == {key: route}
    assert (header(gone).kind, header(gone).sequence) == (rtnl.RTM_DELROUTE, 8)
    # Only ours: the kernel compares protocol and metric.
    assert rtnl.RTMSG.unpack_from(gone, 16)[5] == ROUTE_PROTOCOL


def test_links_without_an_index() -> None:
    nexthop = Nexthop("none0", bytes(4))
    for encode, op in (
        (bulk.encode_neighbours, set_op(Table.NEIGHBOUR, NeighbourKey(*nexthop), bytes(6))),
        (bulk.encode_fdb, set_op(Table.FDB, FdbKey("none0", bytes(6)), bytes(4))),
        (bulk.encode_nexthops, set_op(Table.NEXTHOP, NEXTHOP_ID_FIRST, nexthop)),
        (bulk.encode_routes, set_op(Table.ROUTE, RouteKey(bytes(4), 8), Route(0, b"", nexthop))),
    ):
        with pytest.raises(KeyError, match="none0"):
            encode([op], INDICES, 1)


def reordered(body: bytes, header_size: int) -> bytes:
    """The same attributes the other way round, and one that nobody knows in front."""
    attrs = rtnl.parse_attrs(body, header_size, len(body))
    parts = [rtnl.attr(kind, payload) for kind, payload in reversed(attrs.items())]
    return body[:header_size] + b"".join([rtnl.attr(0x3000, b"new"), *parts])


@given(family=st.sampled_from([4, 16]), order=st.booleans(), data=st.data())
def test_the_order_that_linux_writes_attributes_in_does_not_matter(
    family: int, order: bool, data: st.DataObject
) -> None:
    """Each decoder has a way for the usual order, and one for any: they must agree."""

    def ip() -> bytes:
        return data.draw(st.binary(min_size=family, max_size=family))

    def body(head: bytes, *attrs: tuple[int, bytes]) -> Body:
        content = head + b"".join(rtnl.attr(kind, payload) for kind, payload in attrs)
        return dumped(datagram(0, reordered(content, len(head)) if order else content))

    af = bulk.family_of(bytes(family))
    address, mac, prefix, source = ip(), data.draw(macs), ip(), ip()
    number = rtnl.U32.pack
    info = rtnl.NDMSG.pack(af, IFINDEX, bulk.NUD_PERMANENT, 0, 0)
    cache_info = (3, bytes(16))
    neighbour = body(info, (bulk.NDA_DST, address), (bulk.NDA_LLADDR, mac), cache_info)
    assert bulk.decode_neighbours([neighbour], DEV, IFINDEX) == {NeighbourKey(DEV, address): mac}
    entry = body(info, (bulk.NDA_LLADDR, mac), (bulk.NDA_DST, address), cache_info)
    assert bulk.decode_fdb([entry], DEV, IFINDEX) == {FdbKey(DEV, mac): address}
    nexthop_id = data.draw(nexthop_ids)
    nexthop = body(
        rtnl.NHMSG.pack(af, 0, ROUTE_PROTOCOL, 4),
        (bulk.NHA_ID, number(nexthop_id)), (bulk.NHA_OIF, number(IFINDEX)),
        (bulk.NHA_GATEWAY, address),
    )  # fmt: skip
    assert bulk.decode_nexthops([nexthop], {IFINDEX: DEV}) == (
        {nexthop_id: Nexthop(DEV, address)},
        set(),
    )
    priority = [(bulk.RTA_PRIORITY, number(bulk.IPV6_METRIC))] if family == 16 else []
    route = body(
        rtnl.RTMSG.pack(af, 24, 0, 0, bulk.RT_TABLE_MAIN, ROUTE_PROTOCOL, 0, bulk.RTN_UNICAST, 0),
        (bulk.RTA_TABLE, number(bulk.RT_TABLE_MAIN)), (bulk.RTA_DST, prefix),
        (bulk.RTA_PREFSRC, source), *priority, (bulk.RTA_NH_ID, number(nexthop_id)),
        (bulk.RTA_OIF, number(IFINDEX)),
    )  # fmt: skip
    assert bulk.decode_routes([route], {}) == {RouteKey(prefix, 24): Route(nexthop_id, source)}


def test_objects_of_others_are_not_ours() -> None:
    foreign = rtnl.NHMSG.pack(2, 0, 3, 0) + u32(bulk.NHA_ID, NEXTHOP_ID_FIRST)
    found = dumped(datagram(rtnl.RTM_NEWNEXTHOP, foreign))
    assert bulk.decode_nexthops([found], {}) == ({}, {NEXTHOP_ID_FIRST})
    outside = rtnl.NHMSG.pack(2, 0, ROUTE_PROTOCOL, 0) + u32(bulk.NHA_ID, NEXTHOP_ID_FIRST - 1)
    found = dumped(datagram(rtnl.RTM_NEWNEXTHOP, outside))
    assert bulk.decode_nexthops([found], {}) == ({}, set())
    for protocol, table in ((4, 254), (ROUTE_PROTOCOL, 99)):
        body = rtnl.RTMSG.pack(2, 24, 0, 0, table, protocol, 0, 1, 0)
        assert bulk.decode_routes([dumped(datagram(rtnl.RTM_NEWROUTE, body))], {}) == {}


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        (bulk.RTN_UNICAST, u32(bulk.RTA_OIF, IFINDEX)),  # what it leads to is on the link
        (bulk.RTN_UNICAST, rtnl.attr(9, bytes(16))),  # RTA_MULTIPATH
        (6, b""),  # RTN_BLACKHOLE
    ],
)
def test_a_route_of_ours_that_was_given_another_way(kind: int, attributes: bytes) -> None:
    body = rtnl.RTMSG.pack(2, 24, 0, 0, 254, ROUTE_PROTOCOL, 0, kind, 0)
    body += rtnl.attr(1, bytes((10, 0, 0, 0))) + attributes
    key = RouteKey(bytes((10, 0, 0, 0)), 24)
    found = bulk.decode_routes([dumped(datagram(rtnl.RTM_NEWROUTE, body))], {})
    assert found == {key: Route(bulk.FOREIGN_NEXTHOP)}


@pytest.mark.parametrize("text", ["10.42.3.2/24", "fd00::2/64"])
def test_addresses(text: str) -> None:
    interface = ip_interface(text)
    (found,) = links.decode_addresses([body_of(links.encode_address(interface, IFINDEX))])
    assert found == links.AddressInfo(
        IFINDEX,
        interface.ip.packed,
        interface.network.prefixlen,
        rtnl.RT_SCOPE_UNIVERSE,
        interface.ip.packed,
    )


def test_veth_pairs() -> None:
    request = links.encode_veth(
        "mne0123456789ab", master=5, mtu_bytes=1450, peer_name="eth0", peer_mac=bytes(6),
        peer_netns_fd=9,
    )  # fmt: skip
    assert links.decode_link(body_of(request)) == links.LinkInfo(
        0, "mne0123456789ab", True, 1450, b"", 5, LinkKind.VETH, None
    )


@pytest.mark.parametrize("local", [bytes((10, 9, 0, 1)), b"\xfd" + bytes(15)])
def test_vxlan_devices(local: bytes) -> None:
    local_kind = links.IFLA_VXLAN_LOCAL if len(local) == 4 else links.IFLA_VXLAN_LOCAL6
    data = u32(links.IFLA_VXLAN_ID, 4097) + rtnl.attr(links.IFLA_VXLAN_PORT, b"\x12\xb5")
    data += rtnl.attr(local_kind, local)
    info = rtnl.attr(links.IFLA_INFO_KIND, b"vxlan\0") + rtnl.attr(links.IFLA_INFO_DATA, data)
    body = rtnl.IFINFO.pack(0, 0, IFINDEX, 0, 0) + rtnl.attr(links.IFLA_IFNAME, b"mnv4097\0")
    body += rtnl.attr(links.IFLA_LINKINFO | rtnl.NLA_F_NESTED, info)
    link = links.decode_link(dumped(datagram(rtnl.RTM_NEWLINK, body)))
    assert (link.name, link.up, link.kind) == ("mnv4097", False, LinkKind.VXLAN)
    assert link.vxlan == Vxlan(4097, 4789, local)


@given(addresses)
def test_route_lookups(address: bytes) -> None:
    (asked,) = route_lookups.encode_route_lookups([address], 7)
    found = header(asked)
    assert (found.kind, found.sequence) == (rtnl.RTM_GETROUTE, 7)
    assert rtnl.parse_attrs(asked, 28, len(asked)) == {bulk.RTA_DST: address}


def test_answers_to_route_lookups() -> None:
    body = rtnl.RTMSG.pack(2, 24, 0, 0, 254, 2, 0, bulk.RTN_UNICAST, 0) + u32(bulk.RTA_OIF, 3)
    metrics = rtnl.attr(bulk.RTA_METRICS, u32(route_lookups.RTAX_MTU, 1400))
    gateway = rtnl.attr(bulk.RTA_GATEWAY, bytes(4))
    unreachable = rtnl.RTMSG.pack(2, 24, 0, 0, 254, 2, 0, bulk.RTN_UNREACHABLE, 0)
    for answer, expected in (
        (body, (3, True, 0)),
        (body + metrics, (3, True, 1400)),
        (body + gateway, (3, False, 0)),
        (unreachable, None),
        (body[:12], None),
    ):
        assert route_lookups.decode_route_lookup(answer) == expected


# --- garbage -------------------------------------------------------------------------------------

DECODERS: list[Callable[[Body], object]] = [
    links.decode_link,
    lambda body: list(links.decode_addresses([body])),
    lambda body: bulk.decode_routes([body], {}),
    lambda body: route_lookups.decode_route_lookup(body[0][body[1] : body[2]]),
    lambda body: bulk.decode_neighbours([body], DEV, IFINDEX),
    lambda body: bulk.decode_fdb([body], DEV, IFINDEX),
    lambda body: bulk.decode_nexthops([body], {}),
]
attributes = st.lists(
    st.builds(rtnl.attr, st.integers(0, 0xFFFF), st.binary(max_size=20)), max_size=6
).map(b"".join)
bodies = st.one_of(
    st.binary(max_size=80),
    st.tuples(st.binary(min_size=8, max_size=16), attributes, st.binary(max_size=7)).map(b"".join),
)
kinds = st.sampled_from([16, 17, 20, 24, 28, 104]) | st.integers(0, 0xFFFF)


@pytest.mark.parametrize("decode", DECODERS)
@given(body=bodies)
def test_garbage_is_refused_as_such_or_read(decode: Callable[[Body], object], body: bytes) -> None:
    try:
        decode(dumped(datagram(0, body)))
    except struct.error:
        return


@given(st.binary(max_size=300))
def test_random_datagrams_end(data: bytes) -> None:
    found = list(rtnl.split_messages(data))
    assert len(found) <= len(data) // 16
    assert all(0 <= m.start <= m.end <= len(data) for m in found)
    assert len(rtnl.parse_attrs(data, 0, len(data))) <= len(data) // 4


@given(st.lists(st.tuples(kinds, bodies), max_size=4), st.integers(0, 400))
def test_truncated_datagrams_give_the_messages_before_the_cut(
    sent: list[tuple[int, bytes]], cut: int
) -> None:
    parts = [datagram(kind, body) for kind, body in sent]
    data = b"".join(parts)[:cut]
    starts = accumulate(map(len, parts), initial=0)
    ends = [start + 16 + len(body) for start, (_, body) in zip(starts, sent, strict=False)]
    whole = sum(end <= len(data) for end in ends)
    found = list(rtnl.split_messages(data))
    assert [(m.kind, data[m.start : m.end]) for m in found] == sent[:whole]


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=9)), max_size=5))
def test_attributes(sent: list[tuple[int, bytes]]) -> None:
    data = b"".join(rtnl.attr(kind, payload) for kind, payload in sent)
    assert len(data) % 4 == 0
    assert rtnl.parse_attrs(data, 0, len(data)) == dict(sent)
