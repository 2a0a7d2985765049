"""Difference of two kernel states, as operations in an order that never leaves a half route.

Create firewall element → link → address → neighbour → FDB entry → member → nexthop → route; delete
in the exact reverse, after everything is created.  Only a userspace VTEP's members go and come in
one step, so that a subnet changes hands.  Whole values are compared, never only keys.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from meshnet.firewall.elements import TABLE, format_element
from meshnet.state import (
    AddressKey,
    ElementKey,
    FdbKey,
    KernelState,
    Link,
    LinkKind,
    MemberKey,
    NeighbourKey,
    Nexthop,
    Route,
    RouteKey,
    Ruleset,
    format_ip,
    format_mac,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


_Needs = Callable[[Any, Any], "tuple[tuple[Table, Any], ...]"]


class Table(IntEnum):
    """The kinds of kernel objects, in the order they are created."""

    FIREWALL = 0
    ELEMENT = 1
    SYSCTL = 2
    LINK = 3
    ADDRESS = 4
    NEIGHBOUR = 5
    FDB = 6
    MEMBER = 7
    NEXTHOP = 8
    ROUTE = 9


class Op(NamedTuple):
    """One write to the kernel.

    Attributes:
        value: what to set the object to; None deletes it.
        exists: whether the kernel holds an object of ours with this key: a creation that meets
            somebody else's object must fail rather than replace it.
        needs: objects this one is useless without: if writing one of those failed, this is not
            tried.  They are of other tables; only a link may need a link.
    """

    table: Table
    key: Any
    value: Any
    exists: bool
    needs: tuple[tuple[Table, Any], ...] = ()

    def __str__(self) -> str:
        verb = "delete" if self.value is None else "change" if self.exists else "create"
        return f"{verb} {describe(self.table, self.key)}"


class Failure(NamedTuple):
    """An operation the kernel refused (`errno` and its message) or that was not tried (0)."""

    op: Op
    errno: int
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.reason}"


def diff(desired: KernelState, actual: KernelState) -> list[Op]:
    """The operations that turn `actual` into `desired`; empty if it already is.

    Nothing outside the tables of `actual` is ever deleted, so what a dump leaves out (objects that
    are not ours) is safe.
    """
    rebuilt = {
        name
        for name, link in desired.links.items()
        if name in actual.links and needs_rebuild(link, actual.links[name])
    }
    base = _without_links(actual, rebuilt) if rebuilt else actual
    ops = [Op(Table.LINK, name, None, True) for name in sorted(rebuilt)]
    # The tables are loaded, and removed, with all that is in their sets.
    reload = desired.firewall != actual.firewall
    if reload and desired.firewall is not None:
        ruleset = Ruleset(desired.firewall, desired.elements)
        ops.append(Op(Table.FIREWALL, TABLE, ruleset, False))
    if not reload and desired.elements != actual.elements:
        ops += _set(Table.ELEMENT, desired.elements, actual.elements, _needs_nothing)
    for path, value in desired.sysctls.items():
        if actual.sysctls.get(path) != value:
            ops.append(Op(Table.SYSCTL, path, value, True))
    ops += _set_links(desired.links, base.links)
    needs_peer = _needs_peer(desired)
    in_order: tuple[tuple[Table, _Needs], ...] = (
        (Table.ADDRESS, _needs_link),
        (Table.NEIGHBOUR, _needs_link),
        (Table.FDB, _needs_link),
        (Table.MEMBER, _needs_link),
        (Table.NEXTHOP, needs_peer),
        (Table.ROUTE, _needs_way(needs_peer)),
    )
    # Nearly always they are the same, which is found out in a fifth of the time.
    different = [
        (table, wanted, held, needs)
        for table, needs in in_order
        if (wanted := _table(desired, table)) != (held := _table(base, table))
    ]
    for table, wanted, held, needs in different:
        if table is Table.MEMBER:
            ops += _delete(table, wanted, held)
        ops += _set(table, wanted, held, needs)
    for table, wanted, held, _ in reversed(different):
        if table is not Table.MEMBER:
            ops += _delete(table, wanted, held)
    ops += _delete(Table.LINK, desired.links, _without_veths(base.links))
    if not reload and desired.elements != actual.elements:
        ops += _delete(Table.ELEMENT, desired.elements, actual.elements)
    if reload and desired.firewall is None:
        ops.append(Op(Table.FIREWALL, TABLE, None, True))
    return ops


def missing_endpoint_links(desired: KernelState, actual: KernelState) -> set[str]:
    """Names of endpoint links that should be there and are not.

    A veth pair is neither made nor deleted by an operation here: the endpoint's owner does both,
    and may be at it between a dump and the operations that follow from it.
    """
    return {
        name
        for name, link in desired.links.items()
        if link.kind is LinkKind.VETH and name not in actual.links
    }


def _without_veths(links: Mapping[str, Link]) -> dict[str, Link]:
    return {name: link for name, link in links.items() if link.kind is not LinkKind.VETH}


def needs_rebuild(desired: Link, actual: Link) -> bool:
    """Whether the kernel cannot turn one link into the other in place.

    A TUN stays, with its routes, while its process is exchanged.
    """
    if (desired.kind, desired.parent) != (actual.kind, actual.parent):
        return True
    return desired.kind is not LinkKind.TUN and desired.vxlan != actual.vxlan


def link_matches(desired: Link, actual: Link) -> bool:
    """Whether a link is as desired.

    A desired MAC of None matches any, and only the desired sysctls are looked at.
    """
    return desired._replace(mac=desired.mac or actual.mac, sysctls=()) == actual._replace(
        sysctls=()
    ) and set(desired.sysctls) <= set(actual.sysctls)


def _set_links(desired: Mapping[str, Link], actual: Mapping[str, Link]) -> Iterator[Op]:
    # Bridges before their ports.
    for name, link in sorted(desired.items(), key=lambda item: (bool(item[1].master), item[0])):
        now = actual.get(name)
        if now is None and link.kind is LinkKind.VETH:
            continue  # half of it is in a namespace: `missing_endpoint_links`
        if now is None or not link_matches(link, now):
            needs = ((Table.LINK, link.master),) if link.master else ()
            yield Op(Table.LINK, name, link, now is not None, needs)


def _set(
    table: Table, desired: Mapping[Any, Any], actual: Mapping[Any, Any], needs: _Needs
) -> Iterator[Op]:
    for key, value in desired.items():
        now = actual.get(key)
        if now is None:
            yield Op(table, key, value, False, needs(key, value))
        elif now != value:
            yield Op(table, key, value, True, needs(key, value))


def _delete(table: Table, desired: Mapping[Any, Any], actual: Mapping[Any, Any]) -> Iterator[Op]:
    return (Op(table, key, None, True) for key in actual if key not in desired)


def _needs_nothing(_key: object, _value: object) -> tuple[tuple[Table, Any], ...]:
    return ()


def _needs_link(key: Any, _value: Any) -> tuple[tuple[Table, Any], ...]:  # noqa: ANN401
    return _on_link(key.dev)


@functools.lru_cache
def _on_link(dev: str) -> tuple[tuple[Table, str]]:
    """What all objects on a link need: one tuple for the thousands of them."""
    return ((Table.LINK, dev),)


def _needs_peer(desired: KernelState) -> _Needs:
    """A nexthop is useless without its link, its neighbour and that neighbour's FDB entry."""

    def needs(_key: object, nexthop: Nexthop) -> tuple[tuple[Table, Any], ...]:
        dev, gateway = nexthop
        if not gateway:
            return _on_link(dev)
        neighbour = NeighbourKey(dev, gateway)
        mac = desired.neighbours.get(neighbour)
        if mac is None:
            return _on_link(dev)
        return (*_on_link(dev), (Table.NEIGHBOUR, neighbour), (Table.FDB, FdbKey(dev, mac)))

    return needs


def _needs_way(needs_peer: _Needs) -> _Needs:
    """A route is useless without its nexthop object, or what that of its own gateway would need."""

    def needs(key: RouteKey, route: Route) -> tuple[tuple[Table, Any], ...]:
        if route.nexthop_id:
            return ((Table.NEXTHOP, route.nexthop_id),)
        return needs_peer(key, route.via) if route.via is not None else ()

    return needs


def _without_links(state: KernelState, names: set[str]) -> KernelState:
    """What is left of a state once the kernel has removed some links, and with them the rest."""
    gone = {i for i, nexthop in state.nexthops.items() if nexthop.dev in names}
    return KernelState(
        links={
            k: v._replace(master="") if v.master in names else v
            for k, v in state.links.items()
            if k not in names
        },
        addresses={k: v for k, v in state.addresses.items() if k.dev not in names},
        neighbours={k: v for k, v in state.neighbours.items() if k.dev not in names},
        fdb={k: v for k, v in state.fdb.items() if k.dev not in names},
        members={k: v for k, v in state.members.items() if k.dev not in names},
        nexthops={k: v for k, v in state.nexthops.items() if k not in gone},
        routes={
            k: v
            for k, v in state.routes.items()
            if v.nexthop_id not in gone and (v.via is None or v.via.dev not in names)
        },
        sysctls=state.sysctls,
        firewall=state.firewall,
        elements=state.elements,
    )


def describe(table: Table, key: Any) -> str:  # noqa: ANN401
    """An object in words, for messages: ``neighbour 10.42.3.0 on mnv4097``."""
    name = table.name.lower()
    match table, key:
        case Table.ADDRESS, AddressKey(dev, address, length):
            return f"{name} {format_ip(address)}/{length} on {dev}"
        case Table.NEIGHBOUR, NeighbourKey(dev, address):
            return f"{name} {format_ip(address)} on {dev}"
        case Table.FDB, FdbKey(dev, mac):
            return f"FDB entry {format_mac(mac)} on {dev}"
        case Table.MEMBER, MemberKey(dev, address):
            return f"{name} {format_ip(address)} of {dev}"
        case Table.ELEMENT, ElementKey(set_name, _):
            return f"{name} {{ {format_element(key)} }} of set {set_name}"
        case Table.ROUTE, RouteKey(prefix, length, metric):
            at = "" if metric is None else f" metric {metric}"
            return f"{name} {format_ip(prefix)}/{length}{at}"
        case _:
            return f"{name} {key}"


def merge(state: KernelState, ops: Iterable[Op]) -> KernelState:
    """The state after `ops`: what a kernel that refuses nothing would hold."""
    after = state.copy()
    for op in ops:
        if op.table is Table.FIREWALL:
            text, elements = op.value or (None, {})
            after = replace(after, firewall=text, elements=dict(elements))
        elif op.table is Table.LINK and op.value is None:
            after = _without_links(after, {op.key})
        elif op.value is None:
            _table(after, op.table).pop(op.key, None)
        else:
            _table(after, op.table)[op.key] = op.value
    return after


def _table(state: KernelState, table: Table) -> dict[Any, Any]:
    tables: dict[Table, dict[Any, Any]] = {
        Table.ELEMENT: state.elements,
        Table.SYSCTL: state.sysctls,
        Table.LINK: state.links,
        Table.ADDRESS: state.addresses,
        Table.NEIGHBOUR: state.neighbours,
        Table.FDB: state.fdb,
        Table.MEMBER: state.members,
        Table.NEXTHOP: state.nexthops,
        Table.ROUTE: state.routes,
    }
    return tables[table]
