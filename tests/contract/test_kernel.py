"""What every `Kernel` does: the fake in memory and Linux itself, by the same tests."""

from __future__ import annotations

import errno
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from meshnet.backends import UnderlayPath
from meshnet.diff import diff
from meshnet.errors import NotFoundError
from meshnet.firewall import UNKNOWN
from meshnet.firewall.elements import member, published_elements, source_elements
from meshnet.model import Protocol, PublishedPort
from meshnet.state import (
    NEXTHOP_ID_FIRST,
    AddressKey,
    FdbKey,
    KernelState,
    Link,
    LinkKind,
    NeighbourKey,
    Nexthop,
    Route,
    RouteKey,
    Ruleset,
    format_ip,
)
from meshnet.tables import Op, Table
from tests.contract.changes import (
    BRIDGE,
    CHANGES,
    CIDR4,
    ROUTE4,
    ROUTE6,
    TUNNEL,
    ByHand,
    change_link,
)
from tests.contract.hosts import UNDERLAY_DEV, MemoryHost, real_host
from tests.contract.meshes import DUAL, MESHES, converge, desired_for
from tests.values import (
    make_endpoint,
    make_network,
    underlay_ip,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from meshnet.kernel.fakes.kernel import MemoryKernel
    from tests.contract.hosts import HostUnderTest


DUAL_ADDRESSES = ("10.42.0.2/24", "fd00:42::2/64")
PUBLISHED = (
    PublishedPort(Protocol.TCP, 8080, 80),
    PublishedPort(Protocol.UDP, 53, 53),
    PublishedPort(Protocol.TCP, 8081, 80, underlay_ip(1)),
)


@pytest.fixture(params=["memory", pytest.param("linux", marks=pytest.mark.root)])
def host(
    request: pytest.FixtureRequest, tmp_path: Path, nothing_left: None
) -> Iterator[HostUnderTest]:
    if request.param == "memory":
        yield MemoryHost()
        return
    request.getfixturevalue("root")
    with real_host(tmp_path) as real:
        yield real


def test_an_empty_host(host: HostUnderTest) -> None:
    host.kernel.observe(underlay_ip(1), None)
    state = host.kernel.dump()
    assert state == KernelState(
        sysctls={
            f"net/ipv4/conf/{UNDERLAY_DEV}/forwarding": "0",
            f"net/ipv6/conf/{UNDERLAY_DEV}/accept_ra": "1",
            "net/ipv6/conf/default/accept_ra": "1",
            "net/ipv6/conf/all/forwarding": "0",
        }
    )
    assert host.kernel.writes == 0


def test_the_underlay(host: HostUnderTest) -> None:
    seen = host.kernel.observe(underlay_ip(1), None)
    assert seen.ip == underlay_ip(1)
    assert (seen.dev, seen.mtu_bytes, seen.ipv6) == (UNDERLAY_DEV, 1500, True)
    assert seen.forwarding_links == (UNDERLAY_DEV,)
    assert seen.ra_links == (UNDERLAY_DEV, "default")
    assert seen.paths == {}
    assert host.kernel.observe(None, UNDERLAY_DEV).ip == underlay_ip(1)
    assert host.kernel.observe(underlay_ip(1, 6), None).ip == underlay_ip(1, 6)
    # With a link to look at, the address so far is what to prefer as long as it is there.
    assert host.kernel.observe(underlay_ip(1, 6), UNDERLAY_DEV).ip == underlay_ip(1, 6)
    assert host.kernel.observe(underlay_ip(77), UNDERLAY_DEV).ip == underlay_ip(1)
    with pytest.raises(NotFoundError):
        host.kernel.observe(underlay_ip(77), None)
    with pytest.raises(NotFoundError):
        host.kernel.observe(None, "none0")


def test_link_indices(host: HostUnderTest) -> None:
    host.kernel.observe(underlay_ip(1), None)
    before = dict(host.kernel.link_indices())
    assert before[UNDERLAY_DEV] > 0
    link = Link(LinkKind.BRIDGE, 1450, bytes.fromhex("02670a2a0100"))
    assert host.kernel.apply([Op(Table.LINK, "mnb7", link, False)]) == []
    after = host.kernel.link_indices()
    assert after["mnb7"] not in before.values()
    assert after[UNDERLAY_DEV] == before[UNDERLAY_DEV]


def test_paths(host: HostUnderTest) -> None:
    neighbours = [underlay_ip(2), underlay_ip(2, 6), underlay_ip(3, 6)]
    routed, nowhere = ip_address("10.99.0.1"), ip_address("203.0.113.1")
    behind = UnderlayPath(UNDERLAY_DEV, False, 1400)
    host.by_hand(in_memory=lambda k: k.routed.update({routed: behind, nowhere: None}))
    on_link = UnderlayPath(UNDERLAY_DEV, True, 1500)
    expected = dict.fromkeys(neighbours, on_link) | {routed: behind}
    # The first time without a look at the links before.
    for _ in range(2):
        assert host.kernel.find_paths([*neighbours, routed, nowhere]) == expected
    assert host.kernel.find_paths([]) == {}


def test_indices_of_links(host: HostUnderTest) -> None:
    host.kernel.observe(underlay_ip(1), None)
    before = host.kernel.link_indices()
    assert UNDERLAY_DEV in before
    assert not before.keys() & {BRIDGE, TUNNEL}
    # What is made is known at once, before anybody looks at the links again.
    desired = desired_for(host, [DUAL])
    host.kernel.apply(diff(desired, host.kernel.dump()))
    made = host.kernel.link_indices()
    assert made.keys() == before.keys() | {BRIDGE, TUNNEL}
    assert made.items() >= before.items()
    assert len(set(made.values())) == len(made)
    host.kernel.dump()
    assert host.kernel.link_indices() == made
    # One that is made anew is another one.
    host.kernel.apply([Op(Table.LINK, TUNNEL, None, True)])
    assert TUNNEL not in host.kernel.link_indices()
    host.kernel.apply([Op(Table.LINK, TUNNEL, desired.links[TUNNEL], False)])
    assert host.kernel.link_indices()[TUNNEL] not in made.values()


@pytest.mark.parametrize("mesh", MESHES)
def test_a_planned_network_is_as_planned_after_one_pass(host: HostUnderTest, mesh: str) -> None:
    networks, version = MESHES[mesh]
    desired = desired_for(host, networks, underlay_version=version)
    assert host.kernel.apply(diff(desired, host.kernel.dump())) == []
    writes = host.kernel.writes
    assert writes > 0
    assert diff(desired, host.kernel.dump()) == []
    again = desired_for(host, networks, underlay_version=version)  # nexthop ids are adopted
    assert converge(host, again) == (0, [])
    assert host.kernel.writes == writes


@pytest.mark.parametrize("mesh", MESHES)
def test_removal_leaves_nothing(host: HostUnderTest, mesh: str) -> None:
    networks, version = MESHES[mesh]
    desired = desired_for(host, networks, underlay_version=version)
    converge(host, desired)
    assert host.kernel.apply(diff(KernelState(), host.kernel.dump())) == []
    left = host.kernel.dump()
    assert left == KernelState(sysctls=left.sysctls)


def test_hosts_that_come_and_go(host: HostUnderTest) -> None:
    for hosts in (2, 6, 3):
        desired = desired_for(host, [DUAL], hosts=hosts)
        assert converge(host, desired) == (1, [])
        state = host.kernel.dump()
        assert len(state.nexthops) == len(state.neighbours) == 2 * (hosts - 1)
        assert len(state.fdb) == hosts - 1
        assert len(state.routes) == 2 * (hosts - 1) + 2


def test_sysctls(host: HostUnderTest) -> None:
    converge(host, desired_for(host, [DUAL]))
    sysctls = host.kernel.dump().sysctls
    assert sysctls[f"net/ipv4/conf/{UNDERLAY_DEV}/forwarding"] == "1"
    assert sysctls[f"net/ipv6/conf/{UNDERLAY_DEV}/accept_ra"] == "2"  # stays on a router
    assert sysctls["net/ipv6/conf/all/forwarding"] == "1"
    # A second pass sees a router and no longer asks for accept_ra: it must not be taken back.
    assert converge(host, desired_for(host, [DUAL])) == (0, [])


@pytest.mark.parametrize("changed", [{"port": 4790}, {"vni": 4098}, {"mtu_bytes": 1400}], ids=str)
def test_changed_parameters_of_a_tunnel(host: HostUnderTest, changed: dict[str, Any]) -> None:
    converge(host, desired_for(host, [make_network()]))
    desired = desired_for(host, [make_network(**changed)])
    passes, failures = converge(host, desired)
    assert passes <= 2
    assert failures == []
    links = host.kernel.dump().links
    (tunnel,) = [link for link in links.values() if link.kind is LinkKind.VXLAN]
    assert tunnel.vxlan is not None
    assert (
        changed.items()
        <= {
            "port": tunnel.vxlan.port,
            "vni": tunnel.vxlan.vni,
            "mtu_bytes": tunnel.mtu_bytes,
        }.items()
    )
    assert len(links) == 2


# --- changed by hand ----------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.label)
def test_what_is_changed_by_hand_is_found_and_mended(host: HostUnderTest, change: ByHand) -> None:
    desired = desired_for(host, [DUAL])
    converge(host, desired)
    host.by_hand(change.command, in_memory=change.in_memory)
    found = diff(desired, host.kernel.dump())
    assert {op.table for op in found} == change.seen_in
    passes, failures = converge(host, desired)
    assert failures == []
    assert passes <= 2  # a link that changes takes along what hangs on it


# --- the firewall's elements --------------------------------------------------------------------


def test_elements_that_are_refused_hold_up_no_others(host: HostUnderTest) -> None:
    desired = desired_for(host, [DUAL])
    converge(host, desired)
    known, new = member(underlay_ip(2)), member(underlay_ip(9))
    ops = [
        Op(Table.ELEMENT, known, None, True),
        Op(Table.ELEMENT, member(underlay_ip(8)), None, True),  # gone already
        Op(Table.ELEMENT, new, b"", False),
    ]
    assert host.kernel.apply(ops) == []
    elements = host.kernel.dump().elements
    assert new in elements
    assert known not in elements


def test_where_a_published_port_leads_changes_in_place(host: HostUnderTest) -> None:
    converge(host, desired_for(host, [DUAL]))
    endpoint = replace(make_endpoint(DUAL_ADDRESSES), published=PUBLISHED)
    for target in (
        endpoint,
        replace(endpoint, published=tuple(p._replace(port=81) for p in PUBLISHED)),
    ):
        wanted = published_elements(target)
        assert len(wanted) == 5
        desired = desired_for(host, [DUAL])
        desired.elements |= wanted
        ops = diff(desired, host.kernel.dump())
        assert {op.table for op in ops} == {Table.ELEMENT}
        assert len(ops) == 5
        assert host.kernel.apply(ops) == []
        assert host.kernel.dump().elements.items() >= wanted.items()
    assert converge(host, desired_for(host, [DUAL])) == (1, [])


def test_a_pass_that_is_out_of_date_leaves_endpoints_alone(host: HostUnderTest) -> None:
    endpoint = make_endpoint(DUAL_ADDRESSES)
    own = source_elements(endpoint)
    desired = desired_for(host, [DUAL])
    converge(host, desired)
    add = [Op(Table.ELEMENT, key, value, False) for key, value in own.items()]
    remove = [Op(Table.ELEMENT, key, None, True) for key in own]
    # One that is gone is not added again.
    assert host.kernel.apply(add) == []
    assert not own.keys() & host.kernel.dump().elements.keys()
    # One that came meanwhile is neither removed nor forgotten by a load.
    host.wired.add(own)
    assert host.kernel.apply(add) == []
    assert host.kernel.apply(remove) == []
    assert host.kernel.dump().elements.items() >= own.items()
    load = Op(
        Table.FIREWALL, "meshnet", Ruleset(desired.firewall or UNKNOWN, desired.elements), False
    )
    assert host.kernel.apply([load]) == []
    assert host.kernel.dump().elements.items() >= own.items()
    host.wired.remove(own)
    assert host.kernel.apply(remove) == []
    assert converge(host, desired) == (0, [])


# --- others' objects ----------------------------------------------------------------------------


def test_others_objects_are_neither_reported_nor_touched(host: HostUnderTest) -> None:
    before = host.kernel.dump()
    host.by_hand(
        "ip tuntap add mnfoo mode tun",
        f"ip route add 10.42.0.0/16 via 10.9.0.9 dev {UNDERLAY_DEV} proto 42 metric 5",
        f"ip route add 10.42.1.0/24 via 10.9.0.9 dev {UNDERLAY_DEV} proto 42 table 99",
        f"ip nexthop add id 42 via 10.9.0.9 dev {UNDERLAY_DEV} proto 42",
        f"ip nexthop add id {NEXTHOP_ID_FIRST} via 10.9.0.9 dev {UNDERLAY_DEV} proto 42",
        "nft add table inet guarded; nft add chain inet guarded mine",
        in_memory=lambda kernel: kernel.foreign.nexthops.add(NEXTHOP_ID_FIRST),
    )
    state = host.kernel.dump()
    assert state.foreign_nexthop_ids == {NEXTHOP_ID_FIRST}
    state.foreign_nexthop_ids = frozenset()
    assert state == before
    others = host.others()
    desired = desired_for(host, [DUAL])
    assert NEXTHOP_ID_FIRST not in desired.nexthops
    assert converge(host, desired) == (1, [])
    assert host.others() == others
    assert host.kernel.apply(diff(KernelState(), host.kernel.dump())) == []
    assert host.others() == others


def test_a_route_with_our_protocol_number_and_another_metric_is_removed(
    host: HostUnderTest,
) -> None:
    """It may be preferred to ours."""
    desired = desired_for(host, [DUAL])
    converge(host, desired)
    stray = Route(0, b"", Nexthop(UNDERLAY_DEV, bytes((10, 9, 0, 9))))

    def in_memory(kernel: MemoryKernel) -> None:
        for key, metric in ((ROUTE4, 50), (ROUTE6, 0xFFFFFFFF)):
            kernel._state.routes[key._replace(metric=metric)] = stray

    host.by_hand(
        f"ip route add 10.42.1.0/24 via 10.9.0.9 dev {UNDERLAY_DEV} proto 109 metric 50",
        f"ip route add fd00:42:0:1::/64 via fd09::9 dev {UNDERLAY_DEV} proto 109 metric 4294967295",
        in_memory=in_memory,
    )
    ops = diff(desired, host.kernel.dump())
    assert {(op.key.prefix, op.key.metric, op.value) for op in ops} == {
        (ROUTE4.prefix, 50, None),
        (ROUTE6.prefix, 0xFFFFFFFF, None),
    }
    assert converge(host, desired) == (1, [])
    assert host.kernel.dump().routes == desired.routes


def test_a_route_of_others_to_a_peer_is_reported_and_stays(host: HostUnderTest) -> None:
    host.by_hand(
        f"ip route add 10.42.1.0/24 via 10.9.0.9 dev {UNDERLAY_DEV} proto 42",
        f"ip route add fd00:42:0:1::/64 via fd09::9 dev {UNDERLAY_DEV} proto 42",
        in_memory=lambda kernel: kernel.foreign.routes.update((ROUTE4, ROUTE6)),
    )
    others = host.others()
    desired = desired_for(host, [DUAL])
    for _ in range(2):
        ops = diff(desired, host.kernel.dump())
        failures = host.kernel.apply(ops)
        assert {f.op.key for f in failures} == {ROUTE4, ROUTE6}
        assert {f.errno for f in failures} == {errno.EEXIST}
        assert host.others() == others
    assert {op.key for op in ops} == {ROUTE4, ROUTE6}
    # Removal must not take it along either, even asked for.
    gone = [Op(Table.ROUTE, key, None, True) for key in (ROUTE4, ROUTE6)]
    assert host.kernel.apply(gone) == []
    assert host.others() == others


def test_a_nexthop_that_others_were_quicker_to_make(host: HostUnderTest) -> None:
    desired = desired_for(host, [make_network()])
    ops = diff(desired, host.kernel.dump())
    host.by_hand(
        f"ip nexthop add id {NEXTHOP_ID_FIRST} via 10.9.0.9 dev {UNDERLAY_DEV} proto 42",
        in_memory=lambda kernel: kernel.foreign.nexthops.add(NEXTHOP_ID_FIRST),
    )
    others = host.others()
    refused, not_tried = host.kernel.apply(ops)
    assert (refused.op.table, refused.op.key, refused.errno) == (
        Table.NEXTHOP,
        NEXTHOP_ID_FIRST,
        errno.EEXIST,
    )
    assert not_tried.op.table is Table.ROUTE
    assert not_tried.op.value.nexthop_id == NEXTHOP_ID_FIRST
    assert not_tried.errno == 0
    assert host.others() == others
    assert converge(host, desired_for(host, [make_network()])) == (1, [])


@pytest.mark.parametrize("name", [BRIDGE, TUNNEL])
def test_a_link_of_others_that_is_named_like_ours(host: HostUnderTest, name: str) -> None:
    host.by_hand(
        f"ip tuntap add {name} mode tun", in_memory=lambda kernel: kernel.foreign.links.add(name)
    )
    others = host.others()
    desired = desired_for(host, [DUAL])
    failures = host.kernel.apply(diff(desired, host.kernel.dump()))
    refused = {f.op.key for f in failures if f.errno}
    assert name in refused
    assert {f.op.key.dev for f in failures if f.op.table is Table.ADDRESS} == (
        {BRIDGE} if name == BRIDGE else set()
    )
    state = host.kernel.dump()
    assert state.links.keys() == {BRIDGE, TUNNEL} - {name}
    assert bool(state.nexthops) == (name == BRIDGE)
    assert host.others() == others


# --- refusals -----------------------------------------------------------------------------------


def test_one_refused_message_of_a_batch(host: HostUnderTest) -> None:
    converge(host, desired_for(host, [make_network()]))
    keys = [RouteKey(bytes((10, 77, *divmod(i, 256))), 32) for i in range(1300)]
    ops = [Op(Table.ROUTE, key, Route(NEXTHOP_ID_FIRST), False) for key in keys]
    bad = Op(Table.ROUTE, RouteKey(bytes((10, 78, 0, 0)), 24), Route(NEXTHOP_ID_FIRST + 77), False)
    taken = keys[850]
    host.by_hand(
        f"ip route add {format_ip(taken.prefix)} via 10.9.0.9 dev {UNDERLAY_DEV} proto 42",
        in_memory=lambda kernel: kernel.foreign.routes.add(taken),
    )
    others = host.others()
    # The last of a batch is refused, too: it is not mistaken for the acknowledgement.
    failures = host.kernel.apply([*ops[:100], bad, *ops[100:998], bad, *ops[998:], bad])
    assert [f.op for f in failures] == [bad, ops[850], bad, bad]
    assert [f.errno for f in failures] == [errno.EINVAL, errno.EEXIST, errno.EINVAL, errno.EINVAL]
    assert str(failures[0]).startswith("create route 10.78.0.0/24: ")
    routes = host.kernel.dump().routes
    assert routes.keys() >= set(keys) - {taken}
    assert not {bad.key, taken} & routes.keys()
    assert host.others() == others


def test_progress(host: HostUnderTest) -> None:
    written: list[int] = []
    host.kernel.apply(diff(desired_for(host, [DUAL]), host.kernel.dump()))
    keys = [RouteKey(bytes((10, 77, i >> 8, i & 255)), 32) for i in range(1250)]
    good = [Op(Table.ROUTE, key, Route(NEXTHOP_ID_FIRST), False) for key in keys]
    refused = Op(Table.NEXTHOP, NEXTHOP_ID_FIRST + 77, Nexthop("mnv77", bytes(4)), False)
    bad = Op(
        Table.ROUTE, ROUTE4, Route(refused.key), True, ((Table.NEXTHOP, NEXTHOP_ID_FIRST + 77),)
    )
    ops = [refused, *good, bad]
    assert [f.op for f in host.kernel.apply(ops, written.append)] == [refused, bad]
    assert sum(written) == len(ops)
    assert max(written) <= 500
    written.clear()
    assert host.kernel.apply([], written.append) == []
    assert written == []


def test_what_needs_a_refused_object_is_not_tried(host: HostUnderTest) -> None:
    needs = ((Table.NEXTHOP, NEXTHOP_ID_FIRST),)
    ops = [
        Op(Table.NEXTHOP, NEXTHOP_ID_FIRST, Nexthop(TUNNEL, bytes((10, 42, 1, 0))), False),
        Op(Table.ROUTE, ROUTE4, Route(NEXTHOP_ID_FIRST), False, needs),
        Op(Table.ROUTE, CIDR4, Route(0), False),
    ]
    refused, not_tried = host.kernel.apply(ops)
    assert refused.op is ops[0]
    assert not_tried.op is ops[1]
    assert "nexthop" in not_tried.reason
    assert host.kernel.dump().routes == {CIDR4: Route(0)}


def test_more_neighbours_than_the_table_holds(host: HostUnderTest) -> None:
    """Permanent ones do not count (net/core/neighbour.c, `exempt_from_gc`)."""
    most = int(Path("/proc/sys/net/ipv4/neigh/default/gc_thresh3").read_text())
    if most > 20_000:
        pytest.skip(f"gc_thresh3 of this machine is {most}")
    converge(host, desired_for(host, [make_network()], hosts=1))
    mac = b"\2\0\0\0\0\1"
    keys = [NeighbourKey(TUNNEL, bytes((10, 43, *divmod(i, 256)))) for i in range(most + 1000)]
    ops = [Op(Table.NEIGHBOUR, key, mac, False) for key in keys]
    assert host.kernel.apply(ops) == []
    assert host.kernel.dump().neighbours == dict.fromkeys(keys, mac)


def test_refusals_of_the_kernel(host: HostUnderTest) -> None:
    converge(host, desired_for(host, [make_network()]))
    unknown_source = Route(NEXTHOP_ID_FIRST, bytes((9, 9, 9, 9)))
    cases = {
        errno.EINVAL: Op(Table.ROUTE, RouteKey(bytes((10, 77, 0, 0)), 24), unknown_source, False),
        errno.EEXIST: Op(Table.ROUTE, CIDR4, Route(0), False),
    }
    assert [f.errno for f in host.kernel.apply(list(cases.values()))] == list(cases)
    host.by_hand(f"ip link set {TUNNEL} down", in_memory=change_link(TUNNEL, up=False))
    on_it = Nexthop(TUNNEL, bytes((10, 42, 9, 0)))
    (failure,) = host.kernel.apply([Op(Table.NEXTHOP, NEXTHOP_ID_FIRST + 77, on_it, False)])
    assert failure.errno == errno.ENETDOWN


def test_deleting_what_is_gone_is_no_failure(host: HostUnderTest) -> None:
    converge(host, desired_for(host, [DUAL]))
    keys = [
        (Table.ROUTE, RouteKey(bytes((10, 77, 0, 0)), 24)),
        (Table.NEXTHOP, NEXTHOP_ID_FIRST + 77),
        (Table.FDB, FdbKey(TUNNEL, b"\2\0\0\0\0\x09")),
        (Table.NEIGHBOUR, NeighbourKey(TUNNEL, bytes((10, 42, 77, 0)))),
        (Table.ADDRESS, AddressKey(BRIDGE, bytes((10, 42, 0, 77)), 24)),
        (Table.LINK, "mnb77"),
        (Table.ELEMENT, member(underlay_ip(77))),
        (Table.FIREWALL, "meshnet"),
        (Table.FIREWALL, "meshnet"),
    ]
    assert host.kernel.apply([Op(table, key, None, True) for table, key in keys]) == []
