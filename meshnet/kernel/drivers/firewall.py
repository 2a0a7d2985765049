"""Our nftables tables, and the elements of their sets."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError
from meshnet.firewall import Firewall
from meshnet.kernel.drivers.writing import write_each
from meshnet.kernel.elements import are_wired

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.kernel.drivers.namespace import HostNamespace
    from meshnet.kernel.drivers.nft import NftTables
    from meshnet.kernel.elements import WiredElements
    from meshnet.state import KernelState, Ruleset
    from meshnet.tables import Failure, Op


class FirewallDriver:
    """`meshnet.kernel.drivers.Driver` of the tables as a whole."""

    def __init__(self, namespace: HostNamespace, tables: NftTables, wired: WiredElements) -> None:
        self._namespace = namespace
        self._tables = tables
        self._wired = wired

    def dump(self, state: KernelState) -> None:
        """See `meshnet.kernel.drivers.Driver`."""
        state.firewall = self._tables.read()

    def write(self, ops: Sequence[Op]) -> list[Failure]:
        """See `meshnet.kernel.drivers.Driver`."""
        return write_each(self._namespace, self._write, ops)

    def _write(self, op: Op) -> None:
        if op.value is None:
            self._tables.delete()
        else:
            self._load(op.value)

    def _load(self, ruleset: Ruleset) -> None:
        if not isinstance(ruleset.firewall, Firewall):
            raise KernelRefusedError("the desired firewall is unknown, so it cannot be loaded")
        # Held over the whole load: an attach meanwhile would write to tables that are replaced.
        with self._wired.lock:
            counts = self._namespace.nft.dump_counters()
            held = self._wired.bring_up_to_date(ruleset).elements
            self._tables.load(ruleset.firewall, held, counts)


class ElementDriver:
    """`meshnet.kernel.drivers.Driver` of elements of named sets."""

    def __init__(self, namespace: HostNamespace, wired: WiredElements) -> None:
        self._namespace = namespace
        self._wired = wired

    def dump(self, state: KernelState) -> None:
        """See `meshnet.kernel.drivers.Driver`."""
        state.elements.update(self._namespace.nft.dump_elements())

    def write(self, ops: Sequence[Op]) -> list[Failure]:
        """See `meshnet.kernel.drivers.Driver`."""
        # The lock only where it is needed: writing thousands of members must not hold up an attach.
        with self._wired.lock if are_wired(ops) else contextlib.nullcontext():
            right = self._wired.still_right(ops)
            self._namespace.writes += len(right)
            return self._namespace.nft.write_elements(right)
