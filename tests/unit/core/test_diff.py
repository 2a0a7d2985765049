"""The difference of two kernel states: complete, minimal, and safe at every step."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from meshnet.backends import NexthopIds
from meshnet.diff import diff, merge, missing_endpoint_links
from meshnet.firewall import UNKNOWN
from meshnet.plan import plan_mesh
from meshnet.state import (
    NEXTHOP_ID_FIRST,
    AddressKey,
    ElementKey,
    FdbKey,
    KernelState,
    Link,
    LinkKind,
    NeighbourKey,
    Vxlan,
)
from meshnet.tables import Op, Table, link_matches
from tests.unit import strategies
from tests.values import make_endpoint, make_network, make_snapshot, make_underlay, plan_for

if TYPE_CHECKING:
    from tests.unit.strategies import Scene


def state_of(scene: Scene, actual: KernelState | None = None) -> KernelState:
    ids = NexthopIds()
    if actual is not None:
        ids.adopt(actual.nexthops, actual.foreign_nexthop_ids)
    return plan_mesh(scene.snapshot, scene.local, scene.underlay, ids).state


def tables(state: KernelState) -> dict[str, dict[Any, Any]]:
    return {
        f.name: getattr(state, f.name)
        for f in fields(state)
        if isinstance(getattr(state, f.name), dict)
    }


@st.composite
def damaged(draw: st.DrawFn, state: KernelState) -> KernelState:
    """A state from which objects were removed, and in which objects were changed."""
    after: dict[str, Any] = {}
    for name, table in tables(state).items():
        kept = {k: v for k, v in table.items() if draw(st.integers(0, 4))}
        wreck: bool = draw(st.booleans())
        if wreck and kept and name in ("neighbours", "fdb"):
            key = draw(st.sampled_from(sorted(kept)))
            kept[key] = bytes(len(kept[key]))
        after[name] = kept
    firewalls = [state.firewall, None, UNKNOWN]
    after["firewall"] = draw(st.sampled_from(firewalls))
    if after["firewall"] is None:
        after["elements"] = {}
    return replace(state, **after)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[KernelState, KernelState]:
    """Desired and actual: two scenes of few networks and hosts, so they have much in common."""
    actual = draw(damaged(state_of(draw(strategies.scenes()))))
    return state_of(draw(strategies.scenes()), actual), actual


@settings(max_examples=200)
@given(pairs())
def test_applying_the_difference_leaves_none(pair: tuple[KernelState, KernelState]) -> None:
    desired, actual = pair
    after = merge(actual, diff(desired, actual))
    assert diff(desired, after) == []
    for name, table in tables(desired).items():
        if name != "sysctls":
            assert getattr(after, name) == table, name
    assert desired.sysctls.items() <= after.sysctls.items()


@given(strategies.scenes())
def test_a_state_does_not_differ_from_itself(scene: Scene) -> None:
    state = state_of(scene)
    assert diff(state, state) == []
    assert diff(KernelState(), KernelState()) == []


def half_routes(state: KernelState) -> list[str]:
    """Routes into a tunnel that lack what they need to carry a packet."""
    found = []
    for key, route in state.routes.items():
        if not route.nexthop_id and route.via is None:
            continue
        nexthop = route.via or state.nexthops.get(route.nexthop_id)
        if nexthop is None:
            found.append(f"{key} has no nexthop")
        elif nexthop.dev.startswith("mn"):
            mac = state.neighbours.get(NeighbourKey(nexthop.dev, nexthop.gateway))
            if nexthop.dev not in state.links:
                found.append(f"{key} has no link")
            elif not nexthop.gateway:
                continue  # a TUN's process itself refuses what it has no member for
            elif mac is None:
                found.append(f"{key} has no neighbour")
            elif FdbKey(nexthop.dev, mac) not in state.fdb:
                found.append(f"{key} has no FDB entry")
    return found


@settings(max_examples=200)
@given(strategies.scenes(), strategies.scenes())
def test_no_prefix_of_the_operations_leaves_half_a_route(before: Scene, after: Scene) -> None:
    actual = state_of(before)
    desired = state_of(after, actual)
    ops = diff(desired, actual)
    assert half_routes(actual) == []
    for count in range(len(ops) + 1):
        assert half_routes(merge(actual, ops[:count])) == []


@given(pairs())
def test_order(pair: tuple[KernelState, KernelState]) -> None:
    ops = diff(*pair)
    rebuilt = {op.key for op in ops if op.table is Table.LINK and op.value is not None}
    writes = [op for op in ops if op.value is not None]
    deletes = [
        op
        for op in ops
        if op.value is None
        and not (op.table is Table.LINK and op.key in rebuilt)
        and op.table is not Table.MEMBER  # these go and come in one step
    ]
    assert [op.table for op in writes] == sorted(op.table for op in writes)
    last = [op.table for op in deletes if op.table is not Table.FIREWALL]
    assert last == sorted(last, reverse=True)
    if writes and deletes:
        assert ops.index(writes[-1]) < ops.index(deletes[0])


@given(pairs())
def test_what_is_needed_comes_first(pair: tuple[KernelState, KernelState]) -> None:
    ops = diff(*pair)
    position = {(op.table, op.key): i for i, op in enumerate(ops) if op.value is not None}
    for i, op in enumerate(ops):
        assert all(position.get(need, -1) < i for need in op.needs)


@given(pairs())
def test_each_operation_knows_whether_the_object_is_there(
    pair: tuple[KernelState, KernelState],
) -> None:
    desired, actual = pair
    names = {
        Table.LINK: "links", Table.ADDRESS: "addresses", Table.NEIGHBOUR: "neighbours",
        Table.FDB: "fdb", Table.NEXTHOP: "nexthops", Table.ROUTE: "routes",
        Table.ELEMENT: "elements",
    }  # fmt: skip
    state = actual
    for op in diff(desired, actual):
        if op.table in names:
            assert (op.key in getattr(state, names[op.table])) == op.exists
        state = merge(state, [op])


def test_each_failed_object_holds_back_what_needs_it() -> None:
    plan = plan_for(make_snapshot([make_network()], 2), make_underlay(peers=1))
    ops = {(op.table, op.key): op for op in diff(plan.state, KernelState())}
    (nexthop,) = [op for op in ops.values() if op.table is Table.NEXTHOP]
    assert {table for table, _ in nexthop.needs} == {Table.LINK, Table.NEIGHBOUR, Table.FDB}
    assert all(need in ops for need in nexthop.needs)
    routes = [op for op in ops.values() if op.table is Table.ROUTE]
    assert sorted(op.needs for op in routes) == [(), ((Table.NEXTHOP, NEXTHOP_ID_FIRST),)]


VXLAN = Link(LinkKind.VXLAN, 1450, b"\2mABCD", vxlan=Vxlan(7, 4789, bytes(4)))
BRIDGE = Link(LinkKind.BRIDGE, 1450, b"\2gABCD", sysctls=(("ipv4", "forwarding", "1"),))


def test_links_match_by_what_is_desired_of_them() -> None:
    dumped = BRIDGE._replace(sysctls=(("ipv4", "forwarding", "1"), ("ipv4", "rp_filter", "0")))
    assert link_matches(BRIDGE, dumped)
    assert link_matches(BRIDGE._replace(mac=None), dumped)
    for change in (
        {"mtu_bytes": 1400},
        {"mac": b"\2xABCD"},
        {"up": False},
        {"master": "mnb1"},
        {"sysctls": ()},
    ):
        assert not link_matches(BRIDGE, dumped._replace(**change))


def test_a_changed_tunnel_is_made_anew_with_all_that_hung_on_it() -> None:
    old = plan_for(make_snapshot([make_network()], 3), make_underlay(peers=2)).state
    new = plan_for(make_snapshot([make_network(port=4790)], 3), make_underlay(peers=2)).state
    ops = diff(new, old)
    assert str(ops[0]) == "delete link mnv4097"
    assert [op.table for op in ops[1:]] == (
        [Table.FIREWALL, Table.LINK] + [Table.NEIGHBOUR] * 2 + [Table.FDB] * 2 + [Table.NEXTHOP] * 2
        + [Table.ROUTE] * 2
    )  # fmt: skip
    assert not any(op.exists for op in ops[1:])


def test_ports_of_a_bridge_that_is_made_anew_become_its_ports_again() -> None:
    port = Link(LinkKind.VETH, 1450, b"\2eABCD", master="mnb7")
    actual = KernelState(
        links={"mnb7": VXLAN, "mne0": port},
        addresses={AddressKey("mnb7", b"\x0a\x2a\0\1", 24): True},
    )
    desired = KernelState(
        links={"mnb7": BRIDGE, "mne0": port._replace(mac=None)}, addresses=actual.addresses
    )
    ops = diff(desired, actual)
    assert [str(op) for op in ops] == [
        "delete link mnb7",
        "create link mnb7",
        "change link mne0",
        "create address 10.42.0.1/24 on mnb7",
    ]
    assert ops[2].needs == ((Table.LINK, "mnb7"),)


def test_endpoint_links_are_neither_made_nor_deleted() -> None:
    snapshot = make_snapshot([make_network()], 1)
    with_one = plan_for(snapshot, make_underlay(), endpoints=[make_endpoint()]).state
    without = plan_for(snapshot, make_underlay()).state
    assert missing_endpoint_links(with_one, without) == {"mne0123456789ab"}
    assert missing_endpoint_links(without, with_one) == set()
    for desired, actual in ((with_one, without), (without, with_one)):
        assert {op.table for op in diff(desired, actual)} == {Table.ELEMENT}


def test_operations_say_what_they_do() -> None:
    plan = plan_for(make_snapshot([make_network()], 2), make_underlay(peers=1))
    texts = {str(op) for op in diff(plan.state, KernelState())}
    assert {
        "create firewall meshnet",
        "change sysctl net/ipv4/conf/eth0/forwarding",
        "create link mnv4097",
        "create address 10.42.0.1/24 on mnb4097",
        "create neighbour 10.42.1.0 on mnv4097",
        "create FDB entry 02:6d:0a:2a:01:00 on mnv4097",
        f"create nexthop {NEXTHOP_ID_FIRST}",
        "create route 10.42.1.0/24",
    } <= texts
    assert str(Op(Table.LINK, "mnb7", None, True)) == "delete link mnb7"
    element = Op(Table.ELEMENT, ElementKey("members4", b"\x0a\x09\0\2"), None, True)
    assert str(element) == "delete element { 10.9.0.2 } of set members4"
