"""The tables of the kernel, each specified once: what it holds, what it needs, what it is called.

Otherwise a table is named only by the backend that plans it, by the driver that dumps and writes it
(`meshnet.kernel.drivers`), and by the fake kernel, which imitates what Linux does by itself.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from meshnet.firewall.elements import format_element
from meshnet.state import (
    FdbKey,
    KernelState,
    Link,
    LinkKind,
    NeighbourKey,
    format_ip,
    format_mac,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from meshnet.state import AddressKey, ElementKey, MemberKey, Nexthop, Route, RouteKey

    Rows = Mapping[Any, Any]
    Needs = tuple[tuple["Table", Any], ...]


# --- what objects need ----------------------------------------------------------------------------


def _needs_nothing(_desired: KernelState, _key: object, _value: object) -> Needs:
    return ()


def _needs_master(_desired: KernelState, _name: str, link: Link) -> Needs:
    return _on_link(link.master) if link.master else ()


def _needs_link(_desired: KernelState, key: Any, _value: object) -> Needs:  # noqa: ANN401
    return _on_link(key.dev)


@functools.lru_cache
def _on_link(dev: str) -> Needs:
    """What every object on a link needs: one tuple, shared by the thousands of them."""
    return ((Table.LINK, dev),)


def _needs_peer(desired: KernelState, _key: object, nexthop: Nexthop) -> Needs:
    """A nexthop is useless without its link, its neighbour and that neighbour's FDB entry."""
    dev, gateway = nexthop
    if not gateway:
        return _on_link(dev)
    neighbour = NeighbourKey(dev, gateway)
    mac = desired.neighbours.get(neighbour)
    if mac is None:
        # A gateway on the underlay (direct routing): the kernel resolves it by itself.
        return _on_link(dev)
    return (*_on_link(dev), (Table.NEIGHBOUR, neighbour), (Table.FDB, FdbKey(dev, mac)))


def _needs_way(desired: KernelState, key: RouteKey, route: Route) -> Needs:
    """A route is useless without its nexthop object, or without what its gateway needs."""
    if route.nexthop_id:
        return ((Table.NEXTHOP, route.nexthop_id),)
    return _needs_peer(desired, key, route.via) if route.via is not None else ()


# --- what is left of a table when links go --------------------------------------------------------


def _all(rows: Rows, _state: KernelState, _gone: Collection[str]) -> Rows:
    return rows


def _other_links(rows: Rows, _state: KernelState, gone: Collection[str]) -> Rows:
    return {
        name: link._replace(master="") if link.master in gone else link
        for name, link in rows.items()
        if name not in gone
    }


def _on_other_links(rows: Rows, _state: KernelState, gone: Collection[str]) -> Rows:
    return {key: value for key, value in rows.items() if key.dev not in gone}


def _over_other_links(rows: Rows, _state: KernelState, gone: Collection[str]) -> Rows:
    return {number: nexthop for number, nexthop in rows.items() if nexthop.dev not in gone}


def _by_other_ways(rows: Rows, state: KernelState, gone: Collection[str]) -> Rows:
    dead = {number for number, nexthop in state.nexthops.items() if nexthop.dev in gone}
    return {
        key: route
        for key, route in rows.items()
        if route.nexthop_id not in dead and (route.via is None or route.via.dev not in gone)
    }


# --- links ----------------------------------------------------------------------------------------


def link_matches(desired: Link, actual: Link) -> bool:
    """Whether a link is as desired.

    A desired MAC of None matches any, and only the desired sysctls are looked at.
    """
    return desired._replace(mac=desired.mac or actual.mac, sysctls=()) == actual._replace(
        sysctls=()
    ) and set(desired.sysctls) <= set(actual.sysctls)


def _bridges_first(links: Mapping[str, Link]) -> Iterable[tuple[str, Link]]:
    """Bridges before their ports; by name, so that two passes write in the same order."""
    return sorted(links.items(), key=lambda item: (bool(item[1].master), item[0]))


def _is_endpoints(link: Link) -> bool:
    """A veth pair is half in a namespace: the endpoint's owner makes and deletes it."""
    return link.kind is LinkKind.VETH


# --- in words -------------------------------------------------------------------------------------


def _address(key: AddressKey) -> str:
    return f"{format_ip(key.address)}/{key.prefix_length} on {key.dev}"


def _neighbour(key: NeighbourKey) -> str:
    return f"{format_ip(key.address)} on {key.dev}"


def _fdb_entry(key: FdbKey) -> str:
    return f"{format_mac(key.mac)} on {key.dev}"


def _member(key: MemberKey) -> str:
    return f"{format_ip(key.underlay_ip)} of {key.dev}"


def _element(key: ElementKey) -> str:
    return f"{{ {format_element(key)} }} of set {key.set_name}"


def _route(key: RouteKey) -> str:
    at = "" if key.metric is None else f" metric {key.metric}"
    return f"{format_ip(key.prefix)}/{key.prefix_length}{at}"


# --- the tables -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSpec:
    """All that the generic code knows about a table.

    Attributes:
        rows: name of the table's field in `KernelState`; its type gives keys and values.
        word: what people call one object.
        describe: names one object, given its key.
        needs: given a desired object, those that it is useless without: if writing one of them
            failed, it is not tried.  They are in other tables; only a link may need a link.
        left: the rows that remain in a state when the kernel has removed some links.
        in_order: desired rows in the order to write them in; None: any.
        matches: whether an object is as desired although their values differ; None: never.
        made_elsewhere: whether somebody else makes and deletes an object; None: nobody does.
        lasting: every object is there already and stays: it is never created or deleted.
        hands_over: deletions come before the other writes and go out with them in one step, since
            one object may take over what another had.
    """

    rows: str
    word: str
    describe: Callable[[Any], str] = str
    needs: Callable[[KernelState, Any, Any], Needs] = _needs_nothing
    left: Callable[[Rows, KernelState, Collection[str]], Rows] = _all
    in_order: Callable[[Any], Iterable[tuple[Any, Any]]] | None = None
    matches: Callable[[Any, Any], bool] | None = None
    made_elsewhere: Callable[[Any], bool] | None = None
    lasting: bool = False
    hands_over: bool = False


class Table(IntEnum):
    """The kinds of kernel objects, in the order they are created.

    The firewall is not a table of rows but one value, which is written together with the elements
    of its sets.
    """

    spec: TableSpec

    def __new__(cls, number: int, spec: TableSpec) -> Table:
        """One kind: its place in the order, and its specification."""
        table = int.__new__(cls, number)
        table._value_ = number
        table.spec = spec
        return table

    # Rules and elements first: no link carries a packet before they are there.
    FIREWALL = 0, TableSpec(rows="firewall", word="firewall")
    ELEMENT = 1, TableSpec(rows="elements", word="element", describe=_element)
    SYSCTL = 2, TableSpec(rows="sysctls", word="sysctl", lasting=True)
    LINK = (
        3,
        TableSpec(
            rows="links",
            word="link",
            needs=_needs_master,
            left=_other_links,
            in_order=_bridges_first,  # a port needs its bridge
            matches=link_matches,
            made_elsewhere=_is_endpoints,
        ),
    )
    ADDRESS = (
        4,
        TableSpec(
            rows="addresses",
            word="address",
            describe=_address,
            needs=_needs_link,
            left=_on_other_links,
        ),
    )
    NEIGHBOUR = (
        5,
        TableSpec(
            rows="neighbours",
            word="neighbour",
            describe=_neighbour,
            needs=_needs_link,
            left=_on_other_links,
        ),
    )
    FDB = (
        6,
        TableSpec(
            rows="fdb",
            word="FDB entry",
            describe=_fdb_entry,
            needs=_needs_link,
            left=_on_other_links,
        ),
    )
    MEMBER = (
        7,
        TableSpec(
            rows="members",
            word="member",
            describe=_member,
            needs=_needs_link,
            left=_on_other_links,
            # A subnet belongs to one member at a time, and the process takes an update in one go.
            hands_over=True,
        ),
    )
    NEXTHOP = (
        8,
        TableSpec(rows="nexthops", word="nexthop", needs=_needs_peer, left=_over_other_links),
    )
    ROUTE = (
        9,
        TableSpec(
            rows="routes",
            word="route",
            describe=_route,
            needs=_needs_way,
            left=_by_other_ways,
        ),
    )


ROWS = tuple(table for table in Table if table is not Table.FIREWALL)
"""Tables of rows."""


def rows_of(state: KernelState, table: Table) -> dict[Any, Any]:
    """A table of rows in a state."""
    rows: dict[Any, Any] = getattr(state, table.spec.rows)
    return rows


def describe(table: Table, key: Any) -> str:  # noqa: ANN401
    """An object in words, for messages: ``neighbour 10.42.3.0 on mnv4097``."""
    return f"{table.spec.word} {table.spec.describe(key)}"


# --- writes ---------------------------------------------------------------------------------------


class Op(NamedTuple):
    """One write to the kernel.

    Attributes:
        value: what to set the object to; None deletes it.
        exists: whether the kernel holds an object of ours with this key.  If not, a creation that
            meets somebody else's object must fail rather than replace it.
        needs: see `TableSpec`.
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
    """An operation that the kernel refused (its errno and message) or that was not tried (0)."""

    op: Op
    errno: int
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.reason}"
