"""Our nftables tables, and the elements of their sets.

After a change, flows that began before it are made to follow it (`meshnet.kernel.conntrack`).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError
from meshnet.firewall import Firewall
from meshnet.firewall.elements import binding_of
from meshnet.kernel.conntrack import forget_udp_flows, forget_wrong_flows
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
        with _best_effort():
            forget_wrong_flows(ruleset.firewall, held)


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
            failures = self._namespace.nft.write_elements(right)
        published = (binding_of(op.key) for op in right)
        with _best_effort():
            forget_udp_flows([binding for binding in published if binding is not None])
        return failures


def _best_effort() -> contextlib.suppress:
    """The rules are as they should be, and that is what counts.

    Where the kernel does not tell its flows (it has no ``nf_conntrack_netlink``), or fails to, old
    ones go on as they began.
    """
    return contextlib.suppress(OSError)
