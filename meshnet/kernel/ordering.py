"""Carrying operations out in order: the bookkeeping that the real kernel and the fake share.

Imports no socket, file, clock or trio.
"""

from __future__ import annotations

import errno
import itertools
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from meshnet.tables import Failure, Table, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from meshnet.tables import Op

RUN_OPERATIONS = 500
"""The most operations to write between two reports of progress."""

_GONE = frozenset((errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL))
"""Errnos by which the kernel says that the object of a deletion does not exist: as wanted."""


def carry_out(
    ops: Sequence[Op],
    write: Callable[[Table, Sequence[Op]], Sequence[Failure]],
    on_written: Callable[[int], None] | None = None,
) -> list[Failure]:
    """Write operations in order, leaving out those that need something that failed.

    Args:
        write: writes neighbouring operations on one table, all of which can be tried, and returns
            those that were refused.  A refused deletion of what is gone is not a failure.
        on_written: see `meshnet.kernel.Kernel.apply`.
    """
    failures: list[Failure] = []
    failed: set[tuple[Table, Any]] = set()
    for run in _runs(ops):
        ready = run
        if failed:
            ready = []
            for op in run:
                missing = next((n for n in op.needs if n in failed), None)
                if missing is None:
                    ready.append(op)
                    continue
                reason = f"not tried, since {describe(*missing)} could not be set"
                failures.append(Failure(op, 0, reason))
                failed.add((op.table, op.key))
        for failure in write(run[0].table, ready):
            if failure.op.value is not None or failure.errno not in _GONE:
                failures.append(_with_remedy(failure))
                failed.add((failure.op.table, failure.op.key))
        if on_written is not None:
            on_written(len(run))
    return failures


def _with_remedy(failure: Failure) -> Failure:
    """Add the remedy where the kernel's words do not suggest it."""
    if failure.op.table is Table.NEIGHBOUR and failure.errno == errno.ENOBUFS:
        version = 4 if len(failure.op.key.address) == 4 else 6
        setting = f"net.ipv{version}.neigh.default.gc_thresh3"
        return failure._replace(
            reason=f"{failure.reason}: the machine's neighbour table is full: raise {setting}"
        )
    return failure


def _runs(ops: Sequence[Op]) -> Iterator[list[Op]]:
    """Neighbouring operations on one table; links one by one, since they may need each other."""
    for table, neighbours in itertools.groupby(ops, attrgetter("table")):
        run = list(neighbours)
        most = RUN_OPERATIONS if table is not Table.LINK else 1
        for start in range(0, len(run), most):
            yield run[start : start + most]
