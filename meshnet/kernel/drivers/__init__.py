"""Drivers: each dumps one table of the kernel, and writes it.

They share `namespace`: sockets, and the links of the network namespace as last seen.  A driver gets
all its operations that can be tried at once, and returns those that were refused.  To add a table,
specify it in `meshnet.tables`, and write a driver here, which `meshnet.kernel.netlink` assigns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.state import KernelState
    from meshnet.tables import Failure, Op


class Driver(Protocol):
    """Dumps and writes one table of `meshnet.tables`."""

    def dump(self, state: KernelState) -> None:
        """Add this table's rows as the kernel has them; `state` already has the links.

        Raises:
            OSError: the kernel cannot be asked.
        """
        ...

    def write(self, ops: Sequence[Op]) -> list[Failure]:
        """Carry out operations on this table, in order; returns those that were refused."""
        ...
