"""The difference of two kernel states, as operations in an order that never leaves half a route.

Create in the order of `meshnet.tables.Table`: firewall, element, sysctl, link, address, neighbour,
FDB entry, member, nexthop, route; delete in the exact reverse, after everything is created.  Only a
userspace VTEP's members are deleted and created in one step, so that a subnet can pass from one to
another.  Whole values are compared, never only keys.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from meshnet.firewall.elements import TABLE
from meshnet.state import KernelState, Link, LinkKind, Ruleset
from meshnet.tables import ROWS, Op, Table, rows_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping


def diff(desired: KernelState, actual: KernelState) -> list[Op]:
    """The operations that turn `actual` into `desired`; empty if it already is.

    Only what is in the tables of `actual` is ever deleted.  So objects that a dump leaves out,
    because they are not ours, are safe.
    """
    rebuilt = {
        name
        for name, link in desired.links.items()
        if name in actual.links and needs_rebuild(link, actual.links[name])
    }
    # With a link the kernel drops all that hangs on it, so that is compared as missing.
    base = _without_links(actual, rebuilt) if rebuilt else actual
    ops = [Op(Table.LINK, name, None, True) for name in sorted(rebuilt)]
    # Loading or removing the tables takes their elements along: no operations on those besides.
    reload = desired.firewall != actual.firewall
    if reload and desired.firewall is not None:
        ruleset = Ruleset(desired.firewall, desired.elements)
        ops.append(Op(Table.FIREWALL, TABLE, ruleset, False))
    # Whole tables first: nearly always they are equal, and this takes a fifth of the time.
    different = [
        (table, wanted, held)
        for table in ROWS
        if (wanted := rows_of(desired, table)) != (held := rows_of(base, table))
        and not (reload and table is Table.ELEMENT)
    ]
    for table, wanted, held in different:
        if table.spec.hands_over:
            ops += _delete(table, wanted, held)
        ops += _set(table, desired, wanted, held)
    for table, wanted, held in reversed(different):
        if not table.spec.hands_over:
            ops += _delete(table, wanted, held)
    # Last, as it is created first: no link is left without rules.
    if reload and desired.firewall is None:
        ops.append(Op(Table.FIREWALL, TABLE, None, True))
    return ops


def missing_endpoint_links(desired: KernelState, actual: KernelState) -> set[str]:
    """Names of endpoint links that should exist and do not.

    No operation makes or deletes a veth pair: the endpoint's owner does both, possibly between a
    dump and the operations that follow from it.
    """
    return {
        name
        for name, link in desired.links.items()
        if link.kind is LinkKind.VETH and name not in actual.links
    }


def needs_rebuild(desired: Link, actual: Link) -> bool:
    """Whether turning one link into the other takes a new link.

    A TUN stays, with its routes, while its process is replaced.
    """
    if (desired.kind, desired.parent) != (actual.kind, actual.parent):
        return True
    return desired.kind is not LinkKind.TUN and desired.vxlan != actual.vxlan


def merge(state: KernelState, ops: Iterable[Op]) -> KernelState:
    """The state after `ops`, as in a kernel that refuses nothing."""
    after = state.copy()
    for op in ops:
        if op.table is Table.FIREWALL:
            firewall, elements = op.value or (None, {})
            after = replace(after, firewall=firewall, elements=dict(elements))
        elif op.table is Table.LINK and op.value is None:
            after = _without_links(after, {op.key})
        elif op.value is None:
            rows_of(after, op.table).pop(op.key, None)
        else:
            rows_of(after, op.table)[op.key] = op.value
    return after


def _set(
    table: Table, desired: KernelState, wanted: Mapping[Any, Any], held: Mapping[Any, Any]
) -> Iterator[Op]:
    spec = table.spec
    needs, matches, made_elsewhere = spec.needs, spec.matches, spec.made_elsewhere
    for key, value in wanted.items() if spec.in_order is None else spec.in_order(wanted):
        now = held.get(key)
        if now is None:
            if made_elsewhere is None or not made_elsewhere(value):
                yield Op(table, key, value, spec.lasting, needs(desired, key, value))
        elif now != value and (matches is None or not matches(value, now)):
            yield Op(table, key, value, True, needs(desired, key, value))


def _delete(table: Table, wanted: Mapping[Any, Any], held: Mapping[Any, Any]) -> Iterator[Op]:
    spec = table.spec
    if spec.lasting:
        return
    made_elsewhere = spec.made_elsewhere
    for key, value in held.items():
        if key not in wanted and (made_elsewhere is None or not made_elsewhere(value)):
            yield Op(table, key, None, True)


def _without_links(state: KernelState, names: Collection[str]) -> KernelState:
    """What remains of a state once the kernel has removed some links, and all that was on them."""
    left: dict[str, Any] = {
        table.spec.rows: table.spec.left(rows_of(state, table), state, names) for table in ROWS
    }
    return replace(state, **left)
