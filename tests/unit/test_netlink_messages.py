"""The bulk encoder and decoder: what is encoded is read back, and garbage does no harm."""

from __future__ import annotations

import struct
from ipaddress import ip_interface
from itertools import accumulate
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.kernel import bulk, links, rtnl
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
from tests.unit.messages import datagram, message, u32
from tests.unit.strategies import macs

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.kernel.rtnl import Message

DEV, IFINDEX = "mnv1", 77
addresses = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)
nexthop_ids = st.integers(NEXTHOP_ID_FIRST, NEXTHOP_ID_LAST)


@given(addresses, macs)
def test_neighbours(address: bytes, mac: bytes) -> None:
    key = NeighbourKey(DEV, address)
    found = message(bulk.encode_neighbour(key, mac, IFINDEX))
    assert found.kind == rtnl.RTM_NEWNEIGH
    assert bulk.decode_neighbour(found, DEV, IFINDEX) == (key, mac)
    assert bulk.decode_neighbour(found, DEV, IFINDEX + 1) is None
    gone = message(bulk.encode_neighbour(key, None, IFINDEX))
    assert gone.kind == rtnl.RTM_DELNEIGH


@given(addresses, macs)
def test_fdb_entries(remote: bytes, mac: bytes) -> None:
    key = FdbKey(DEV, mac)
    found = message(bulk.encode_fdb(key, remote, IFINDEX))
    assert bulk.decode_fdb(found, DEV, IFINDEX) == (key, remote)
    assert bulk.decode_fdb(found, DEV, IFINDEX + 1) is None
    assert message(bulk.encode_fdb(key, None, IFINDEX)).kind == rtnl.RTM_DELNEIGH


@given(nexthop_ids, addresses, st.booleans())
def test_nexthops(nexthop_id: int, gateway: bytes, exists: bool) -> None:
    nexthop = Nexthop(DEV, gateway)
    request = bulk.encode_nexthop(nexthop_id, nexthop, IFINDEX, exists=exists)
    assert bool(request.flags & rtnl.NLM_F_EXCL) != exists
    assert bulk.decode_nexthop(message(request), {IFINDEX: DEV}) == (nexthop_id, nexthop)
    gone = bulk.encode_nexthop(nexthop_id, None, 0, exists=True)
    assert gone.kind == rtnl.RTM_DELNEXTHOP


@given(
    prefix=addresses,
    length=st.integers(0, 32),
    nexthop_id=nexthop_ids | st.just(0),
    source=st.booleans(),
    exists=st.booleans(),
)
def test_routes(prefix: bytes, length: int, nexthop_id: int, source: bool, exists: bool) -> None:
    key, route = RouteKey(prefix, length), Route(nexthop_id, prefix if source else b"")
    request = bulk.encode_route(key, route, exists=exists)
    assert bool(request.flags & rtnl.NLM_F_EXCL) != exists
    assert bulk.decode_route(message(request)) == (key, route)
    gone = bulk.encode_route(key, None, exists=True)
    assert gone.kind == rtnl.RTM_DELROUTE
    # Only ours: the kernel compares protocol and metric.
    assert rtnl.RTMSG.unpack_from(gone.body)[5] == ROUTE_PROTOCOL


def test_objects_of_others_are_not_ours() -> None:
    foreign = rtnl.NHMSG.pack(2, 0, 3, 0) + u32(bulk.NHA_ID, NEXTHOP_ID_FIRST)
    (found,) = rtnl.split_messages(datagram(rtnl.RTM_NEWNEXTHOP, foreign))
    assert bulk.decode_nexthop(found, {}) == (NEXTHOP_ID_FIRST, None)
    outside = rtnl.NHMSG.pack(2, 0, ROUTE_PROTOCOL, 0) + u32(bulk.NHA_ID, NEXTHOP_ID_FIRST - 1)
    (found,) = rtnl.split_messages(datagram(rtnl.RTM_NEWNEXTHOP, outside))
    assert bulk.decode_nexthop(found, {}) is None
    for protocol, table, metric in ((4, 254, 0), (ROUTE_PROTOCOL, 99, 0), (ROUTE_PROTOCOL, 254, 5)):
        body = rtnl.RTMSG.pack(2, 24, 0, 0, table, protocol, 0, 1, 0) + u32(6, metric)
        (found,) = rtnl.split_messages(datagram(rtnl.RTM_NEWROUTE, body))
        assert bulk.decode_route(found) is None


def test_a_route_of_ours_that_was_given_a_gateway() -> None:
    body = rtnl.RTMSG.pack(2, 24, 0, 0, 254, ROUTE_PROTOCOL, 0, 1, 0)
    body += rtnl.attr(1, bytes((10, 0, 0, 0)))
    (found,) = rtnl.split_messages(datagram(rtnl.RTM_NEWROUTE, body))
    key = RouteKey(bytes((10, 0, 0, 0)), 24)
    assert bulk.decode_route(found) == (key, Route(bulk.FOREIGN_NEXTHOP))


@pytest.mark.parametrize("text", ["10.42.3.2/24", "fd00::2/64"])
def test_addresses(text: str) -> None:
    interface = ip_interface(text)
    found = links.decode_address(message(links.encode_address(interface, IFINDEX)))
    assert found == links.AddressInfo(
        IFINDEX, interface.ip.packed, interface.network.prefixlen, links.RT_SCOPE_UNIVERSE
    )


def test_veth_pairs() -> None:
    request = links.encode_veth(
        "mne0123456789ab", master=5, mtu_bytes=1450, peer_name="eth0", peer_mac=bytes(6),
        peer_netns_fd=9,
    )  # fmt: skip
    assert links.decode_link(message(request)) == links.LinkInfo(
        0, "mne0123456789ab", True, 1450, b"", 5, LinkKind.VETH, None
    )
    assert links.decode_address(message(request)) is None


@pytest.mark.parametrize("local", [bytes((10, 9, 0, 1)), b"\xfd" + bytes(15)])
def test_vxlan_devices(local: bytes) -> None:
    local_kind = links.IFLA_VXLAN_LOCAL if len(local) == 4 else links.IFLA_VXLAN_LOCAL6
    data = u32(links.IFLA_VXLAN_ID, 4097) + rtnl.attr(links.IFLA_VXLAN_PORT, b"\x12\xb5")
    data += rtnl.attr(local_kind, local)
    info = rtnl.attr(links.IFLA_INFO_KIND, b"vxlan\0") + rtnl.attr(links.IFLA_INFO_DATA, data)
    body = rtnl.IFINFO.pack(0, 0, IFINDEX, 0, 0) + rtnl.attr(links.IFLA_IFNAME, b"mnv4097\0")
    body += rtnl.attr(links.IFLA_LINKINFO | links.NLA_F_NESTED, info)
    (found,) = rtnl.split_messages(datagram(rtnl.RTM_NEWLINK, body))
    link = links.decode_link(found)
    assert link is not None
    assert (link.name, link.up, link.kind) == ("mnv4097", False, LinkKind.VXLAN)
    assert link.vxlan == Vxlan(4097, 4789, local)


def test_route_lookups() -> None:
    body = rtnl.RTMSG.pack(2, 24, 0, 0, 254, 2, 0, bulk.RTN_UNICAST, 0) + u32(bulk.RTA_OIF, 3)
    metrics = rtnl.attr(bulk.RTA_METRICS, u32(bulk.RTAX_MTU, 1400))
    gateway = rtnl.attr(bulk.RTA_GATEWAY, bytes(4))
    unreachable = rtnl.RTMSG.pack(2, 24, 0, 0, 254, 2, 0, bulk.RTN_UNREACHABLE, 0)
    for answer, expected in (
        (body, (3, True, 0)),
        (body + metrics, (3, True, 1400)),
        (body + gateway, (3, False, 0)),
        (unreachable, None),
        (body[:12], None),
    ):
        (found,) = rtnl.split_messages(datagram(rtnl.RTM_NEWROUTE, answer))
        assert bulk.decode_route_lookup(found) == expected


# --- garbage -------------------------------------------------------------------------------------

DECODERS: list[Callable[[Message], object]] = [
    links.decode_link,
    links.decode_address,
    bulk.decode_route,
    bulk.decode_route_lookup,
    lambda m: bulk.decode_neighbour(m, DEV, IFINDEX),
    lambda m: bulk.decode_fdb(m, DEV, IFINDEX),
    lambda m: bulk.decode_nexthop(m, {}),
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
@given(kind=kinds, body=bodies)
def test_garbage_is_refused_as_such_or_read(
    decode: Callable[[Message], object], kind: int, body: bytes
) -> None:
    (found,) = rtnl.split_messages(datagram(kind, body))
    try:
        decode(found)
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
