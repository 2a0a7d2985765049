"""Carrying operations out in order: the bookkeeping that the real kernel and the fake share.

Imports no socket, file, clock or trio.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from meshnet.diff import Failure, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from meshnet.diff import Op, Table

_GONE = frozenset((errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL))
"""What a deletion wanted is so already."""


def carry_out(
    ops: Sequence[Op], write: Callable[[Table, Sequence[Op]], Sequence[Failure]]
) -> list[Failure]:
    """Write operations in order, leaving out those that need something that failed.

    Args:
        write: writes neighbouring operations on one table, all of which can be tried, and returns
            those that were refused.  A refused deletion of what is gone is no failure.
    """
    failures: list[Failure] = []
    failed: set[tuple[Table, Any]] = set()
    for table, run in _runs(ops):
        ready: list[Op] = []
        for op in run:
            missing = next((n for n in op.needs if n in failed), None)
            if missing is None:
                ready.append(op)
                continue
            reason = f"not tried, since {describe(*missing)} could not be set"
            failures.append(Failure(op, 0, reason))
            failed.add((op.table, op.key))
        refused = [f for f in write(table, ready) if f.op.value is not None or f.errno not in _GONE]
        failures += refused
        failed.update((f.op.table, f.op.key) for f in refused)
    return failures


def _runs(ops: Sequence[Op]) -> Iterator[tuple[Table, list[Op]]]:
    """Neighbouring operations on one table, none of which needs another of the same run."""
    run: list[Op] = []
    for op in ops:
        inner = any(table is op.table for table, _ in op.needs)
        if run and (inner or run[-1].table is not op.table):
            yield run[-1].table, run
            run = []
        run.append(op)
    if run:
        yield run[-1].table, run
