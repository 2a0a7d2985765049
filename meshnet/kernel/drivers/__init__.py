"""Drivers: each dumps one table of the kernel, and writes it.

`namespace` is what they share: sockets, and the links of the network namespace as last seen.  A
driver gets all its operations that can be tried at once, and gives back those that were refused.
Adding a table: its specification in `meshnet.tables`, and a driver here that
`meshnet.kernel.netlink` puts in its place.
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
        """Add what the kernel has of this table; `state` has the links already.

        Raises:
            OSError: the kernel cannot be asked.
        """
        ...

    def write(self, ops: Sequence[Op]) -> list[Failure]:
        """Carry operations on this table out, in order; returns those that were refused."""
        ...
