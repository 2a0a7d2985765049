"""Faults that a test wants of the kernel in memory: which operation is refused, and how."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from meshnet.tables import Table


class RefusedError(Exception):
    """The kernel's errno for one request; not an error of ours."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(f"{os.strerror(code)} ({message})" if message else os.strerror(code))
        self.code = code


class _Fault(NamedTuple):
    """The operation to fail: the `left`-th from now on, of `table` or of any."""

    table: Table | None
    left: int
    code: int


class Faults:
    """Operations that are to be refused."""

    def __init__(self) -> None:
        self._faults: list[_Fault] = []

    def fail_next(self, table: Table | None = None, *, nth: int = 1, code: int = 105) -> None:
        """Fault injection: refuse one operation to come, with errno `code` (105: ENOBUFS).

        Args:
            table: count operations on this table; None: all.
            nth: 1 refuses the next one.
        """
        self._faults.append(_Fault(table, nth, code))

    @property
    def faults_left(self) -> int:
        """Operations that were to be refused and were not met yet."""
        return len(self._faults)

    def meet(self, table: Table) -> None:
        """Count an operation on a table.

        Raises:
            RefusedError: it is one to be refused.
        """
        left, met = [], None
        for fault in self._faults:
            if fault.table not in (None, table):
                left.append(fault)
            elif fault.left > 1:
                left.append(fault._replace(left=fault.left - 1))
            else:
                met = fault
        self._faults = left
        if met is not None:
            raise RefusedError(met.code, "as the test wants")
