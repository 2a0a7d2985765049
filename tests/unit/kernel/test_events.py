"""Which notifications of the kernel wake the reconciler."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.kernel.events import EventFilter, nftables_concerns_us, others_rules_changed
from meshnet.kernel.wire import bulk, links, rtnl
from meshnet.state import NEXTHOP_ID_FIRST, ROUTE_PROTOCOL
from tests.unit.messages import datagram, u32

BRIDGE, OWN, UNDERLAY, HOST, OTHER = 6, 7, 2, 3, 99
GONE = bytes((10, 42, 3, 0))
_SCOPE_LINK = 253
ENDED = "mnefedcba987654"


@pytest.fixture
def events() -> EventFilter:
    return make_filter()


def make_filter() -> EventFilter:
    deleted = {(2, OWN, GONE), (rtnl.AF_BRIDGE, OWN, bytes(6))}
    found = EventFilter(deleted, lambda name: name != ENDED)
    found.look_at({BRIDGE}, {OWN}, {UNDERLAY}, {HOST})
    return found


def link(
    index: int, name: str, kind: int = rtnl.RTM_NEWLINK, flags: int = 0, more: bytes = b""
) -> bytes:
    body = rtnl.IFINFO.pack(0, 0, index, flags, 0)
    return datagram(kind, body + rtnl.attr(links.IFLA_IFNAME, name.encode() + b"\0") + more)


def address(index: int, kind: int = rtnl.RTM_DELADDR, scope: int = 0) -> bytes:
    return datagram(kind, rtnl.IFADDR.pack(2, 24, 0, scope, index))


def port(index: int, name: str) -> bytes:
    return link(index, name, flags=links.IFF_UP, more=u32(links.IFLA_MASTER, OTHER))


def neighbour(
    index: int, address: bytes = bytes(4), kind: int = rtnl.RTM_DELNEIGH, family: int = 2
) -> bytes:
    key = bulk.NDA_LLADDR if family == rtnl.AF_BRIDGE else bulk.NDA_DST
    body = rtnl.NDMSG.pack(family, index, 0, 0, 0) + rtnl.attr(key, address)
    return datagram(kind, body)


def route(protocol: int, oif: int = 0, table: int = bulk.RT_TABLE_MAIN) -> bytes:
    body = rtnl.RTMSG.pack(2, 24, 0, 0, table, protocol, 0, 1, 0)
    return datagram(rtnl.RTM_DELROUTE, body + (u32(bulk.RTA_OIF, oif) if oif else b""))


def nexthop(nexthop_id: int) -> bytes:
    body = rtnl.NHMSG.pack(2, 0, 0, 0) + u32(bulk.NHA_ID, nexthop_id)
    return datagram(rtnl.RTM_DELNEXTHOP, body)


def netconf(index: int) -> bytes:
    return datagram(80, bytes((2, 0, 0, 0)) + u32(1, index))


@pytest.mark.parametrize(
    "data",
    [
        link(OWN, "whatever"),
        link(UNDERLAY, "eth0"),
        link(OTHER, "mnv4097"),
        link(OTHER, "mnb4097", rtnl.RTM_DELLINK),
        link(OTHER, "mne0123456789ab", rtnl.RTM_DELLINK),
        link(OTHER, "mne0123456789ab"),  # it is down
        address(OWN),
        address(UNDERLAY),
        address(BRIDGE),
        neighbour(OWN),
        neighbour(OWN, GONE, rtnl.RTM_NEWNEIGH),
        neighbour(OWN, bytes((2, 0, 0, 0, 0, 1)), family=rtnl.AF_BRIDGE),
        route(ROUTE_PROTOCOL),
        route(4, OWN),
        route(4, UNDERLAY),
        nexthop(NEXTHOP_ID_FIRST),
        netconf(OWN),
        netconf(UNDERLAY),
        # A link of the host that packets may come by from now on.
        link(OTHER, "eth7", flags=links.IFF_UP),
        address(OTHER, rtnl.RTM_NEWADDR),
        netconf(HOST),
    ],
)
def test_what_concerns_us(events: EventFilter, data: bytes) -> None:
    assert events.concerns_us(data)
    # Behind others, too.
    assert make_filter().concerns_us(address(OTHER) + data)


@pytest.mark.parametrize(
    "data",
    [
        link(OTHER, "eth7"),
        link(OTHER, "eth7", rtnl.RTM_DELLINK, links.IFF_UP),
        link(HOST, "eth1", flags=links.IFF_UP),
        port(OTHER, "eth7"),
        address(HOST, rtnl.RTM_NEWADDR),
        address(OTHER, rtnl.RTM_NEWADDR, _SCOPE_LINK),
        route(4, HOST),
        link(OTHER, "mnfoo"),
        link(OTHER, "mne0123456789ab", flags=links.IFF_UP),  # made by the dozen, by ourselves
        link(OTHER, ENDED),
        address(OTHER),
        link(OTHER, ENDED, rtnl.RTM_DELLINK),
        neighbour(OTHER),
        neighbour(UNDERLAY),
        neighbour(BRIDGE),  # an endpoint, which the host resolved by itself
        neighbour(OWN, GONE),
        neighbour(OWN, bytes(6), family=rtnl.AF_BRIDGE),
        route(4, OTHER),
        route(ROUTE_PROTOCOL, table=99),
        nexthop(NEXTHOP_ID_FIRST - 1),
        netconf(OTHER),
        datagram(999, bytes(16)),
        b"",
    ],
)
def test_what_does_not(events: EventFilter, data: bytes) -> None:
    assert not events.concerns_us(data)


def test_a_link_that_looks_as_before_is_no_news(events: EventFilter) -> None:
    def bridge(mtu: int, flags: int = 1) -> bytes:
        body = rtnl.IFINFO.pack(0, 0, BRIDGE, flags, 0)
        return datagram(rtnl.RTM_NEWLINK, body + u32(links.IFLA_MTU, mtu))

    running = 0x10041
    assert events.concerns_us(bridge(1450))
    assert not events.concerns_us(bridge(1450, running))  # a port came
    assert events.concerns_us(bridge(1300, running))
    assert events.concerns_us(bridge(1450, running))
    assert events.concerns_us(bridge(1450, 0))  # down
    assert events.concerns_us(bridge(1450))
    assert events.concerns_us(link(BRIDGE, "mnb1", rtnl.RTM_DELLINK))


def test_links_are_told_anew_after_every_pass(events: EventFilter) -> None:
    events.look_at({OTHER}, (), ())
    assert events.concerns_us(address(OTHER))
    assert not events.concerns_us(address(OWN))


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    EventFilter().concerns_us(data)
    nftables_concerns_us(data)
    others_rules_changed(data)


@given(st.sampled_from([16, 20, 24, 28, 80, 104]), st.binary(max_size=40))
def test_messages_that_cannot_be_read_may_concern_us(kind: int, body: bytes) -> None:
    EventFilter().concerns_us(datagram(kind, body))
    if kind in (16, 20, 24, 28):
        assert EventFilter().concerns_us(datagram(kind, b""))


def rules(kind: int, table: str, subsystem: int = 10) -> bytes:
    body = bytes(4) + rtnl.attr(1, table.encode() + b"\0")
    return datagram(subsystem << 8 | kind, body)


def test_rules_of_others() -> None:
    assert others_rules_changed(rules(3, "filter"))
    assert others_rules_changed(rules(6, "meshnet") + rules(6, "firewalld"))
    assert not others_rules_changed(rules(6, "meshnet"))
    assert not others_rules_changed(rules(12, "fail2ban"))  # an element of a set
    assert not others_rules_changed(rules(15, "filter"))


def test_nftables() -> None:
    assert nftables_concerns_us(rules(2, "meshnet"))
    assert nftables_concerns_us(rules(6, "other") + rules(6, "meshnet"))
    assert not nftables_concerns_us(rules(2, "other"))
    assert not nftables_concerns_us(rules(15, "meshnet"))  # a new generation, of any table
    assert not nftables_concerns_us(rules(2, "meshnet", subsystem=1))
    assert not nftables_concerns_us(b"")


def test_a_link_that_is_waited_for(events: EventFilter) -> None:
    assert not events.concerns_us(link(OTHER, "eth7"))
    events.look_at({BRIDGE}, {OWN}, {UNDERLAY}, awaited={"eth7"})
    assert events.concerns_us(link(OTHER, "eth7"))
    assert not events.concerns_us(link(OTHER, "eth8"))
