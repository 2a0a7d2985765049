"""The bookkeeping of operations that need each other."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from meshnet.kernel.ordering import carry_out
from meshnet.state import Link, LinkKind, NeighbourKey, Nexthop, Route, RouteKey
from meshnet.tables import Failure, Op, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

BRIDGE = Link(LinkKind.BRIDGE, 1450, bytes(6))
LINK_A = Op(Table.LINK, "mnb1", BRIDGE, False)
PORT_A = Op(Table.LINK, "mne1", BRIDGE, True, ((Table.LINK, "mnb1"),))
LINK_B = Op(Table.LINK, "mnv1", BRIDGE, False)
NEXTHOP = Op(Table.NEXTHOP, 1, Nexthop("mnv1", bytes(4)), False, ((Table.LINK, "mnv1"),))
ROUTE = Op(Table.ROUTE, RouteKey(bytes(4), 8), Route(1), False, ((Table.NEXTHOP, 1),))
OTHER = Op(Table.ROUTE, RouteKey(bytes(4), 9), Route(0), False)


class Writer:
    """Refuses the operations that a test names, and remembers all that it was given."""

    def __init__(self, *refused: Op, code: int = errno.EPERM) -> None:
        self.runs: list[list[Op]] = []
        self._refused = refused
        self._code = code

    def __call__(self, table: Table, ops: Sequence[Op]) -> list[Failure]:
        assert all(op.table is table for op in ops)
        self.runs.append(list(ops))
        return [Failure(op, self._code, "refused") for op in ops if op in self._refused]


def test_neighbours_of_one_table_go_together_and_in_order() -> None:
    writer = Writer()
    assert carry_out([LINK_A, LINK_B, NEXTHOP, ROUTE, OTHER], writer) == []
    assert writer.runs == [[LINK_A], [LINK_B], [NEXTHOP], [ROUTE, OTHER]]
    assert carry_out([], writer) == []


def test_what_needs_a_failed_one_is_not_tried_nor_what_needs_that() -> None:
    writer = Writer(LINK_B)
    failures = carry_out([LINK_A, LINK_B, NEXTHOP, ROUTE, OTHER], writer)
    assert [f.op for f in failures] == [LINK_B, NEXTHOP, ROUTE]
    assert [f.errno for f in failures] == [errno.EPERM, 0, 0]
    assert failures[1].reason == "not tried, since link mnv1 could not be set"
    assert failures[2].reason == "not tried, since nexthop 1 could not be set"
    assert writer.runs[-1] == [OTHER]


def test_a_link_that_needs_another() -> None:
    assert carry_out([LINK_A, LINK_B, PORT_A], Writer()) == []
    failures = carry_out([LINK_A, LINK_B, PORT_A], Writer(LINK_A))
    assert [f.op for f in failures] == [LINK_A, PORT_A]


@pytest.mark.parametrize(("version", "size"), [(4, 4), (6, 16)])
def test_a_full_neighbour_table_has_a_remedy(version: int, size: int) -> None:
    neighbour = Op(Table.NEIGHBOUR, NeighbourKey("mnv1", bytes(size)), bytes(6), False)
    (failure,) = carry_out([neighbour], Writer(neighbour, code=errno.ENOBUFS))
    assert failure.reason.startswith("refused: ")
    assert failure.reason.endswith(f"raise net.ipv{version}.neigh.default.gc_thresh3")
    (failure,) = carry_out([NEXTHOP], Writer(NEXTHOP, code=errno.ENOBUFS))
    assert failure.reason == "refused"


def test_a_deletion_of_what_is_gone_is_no_failure() -> None:
    gone = Op(Table.ROUTE, OTHER.key, None, True)
    for code in (errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL):
        assert carry_out([gone], Writer(gone, code=code)) == []
        assert carry_out([OTHER], Writer(OTHER, code=code))
    assert carry_out([gone], Writer(gone, code=errno.EPERM))
