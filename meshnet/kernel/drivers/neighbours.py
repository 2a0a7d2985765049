"""Neighbours and FDB entries of VXLAN devices: both are neighbours to rtnetlink (RTM_NEWNEIGH)."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from meshnet.kernel.drivers.writing import write_packed
from meshnet.kernel.wire import bulk, rtnl
from meshnet.state import LinkKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from meshnet.kernel.drivers.namespace import HostNamespace
    from meshnet.kernel.wire.rtnl import Body
    from meshnet.state import KernelState
    from meshnet.tables import Failure, Op


class NeighbourDriver:
    """`meshnet.kernel.drivers.Driver` of permanent neighbours."""

    def __init__(self, namespace: HostNamespace) -> None:
        self._namespace = namespace

    def dump(self, state: KernelState) -> None:
        """See `meshnet.kernel.drivers.Driver`."""
        for dev, index, bodies in _dump(self._namespace, state, socket.AF_UNSPEC):
            state.neighbours.update(bulk.decode_neighbours(bodies, dev, index))

    def write(self, ops: Sequence[Op]) -> list[Failure]:
        """See `meshnet.kernel.drivers.Driver`."""

        def note(sent: Sequence[Op]) -> None:
            _note_deletions(
                self._namespace, sent, lambda op: (bulk.family_of(op.key.address), op.key.address)
            )

        return write_packed(self._namespace, bulk.encode_neighbours, ops, note)


class FdbDriver:
    """`meshnet.kernel.drivers.Driver` of FDB entries."""

    def __init__(self, namespace: HostNamespace) -> None:
        self._namespace = namespace

    def dump(self, state: KernelState) -> None:
        """See `meshnet.kernel.drivers.Driver`."""
        for dev, index, bodies in _dump(self._namespace, state, rtnl.AF_BRIDGE):
            state.fdb.update(bulk.decode_fdb(bodies, dev, index))

    def write(self, ops: Sequence[Op]) -> list[Failure]:
        """See `meshnet.kernel.drivers.Driver`."""

        def note(sent: Sequence[Op]) -> None:
            _note_deletions(self._namespace, sent, lambda op: (rtnl.AF_BRIDGE, op.key.mac))

        return write_packed(self._namespace, bulk.encode_fdb, ops, note)


def _dump(
    namespace: HostNamespace, state: KernelState, family: int
) -> Iterator[tuple[str, int, list[Body]]]:
    """Name and index of each VXLAN device, and its neighbours of a family."""
    # One dump for each device: the kernel filters by it, and the host's own neighbours stay out.
    for dev, link in state.links.items():
        if link.kind is LinkKind.VXLAN:
            index = namespace.indices[dev]
            body = bulk.neighbour_dump(family, index)
            yield dev, index, namespace.rtnl.dump(rtnl.RTM_GETNEIGH, body)


def _note_deletions(
    namespace: HostNamespace, ops: Sequence[Op], identify: Callable[[Op], tuple[int, bytes]]
) -> None:
    """Keep `deleted` current; called before the write, so that the notification comes later."""
    if not namespace.deleted:
        # A start creates 20,000 and deletes none: there is nothing to discard.
        ops = [op for op in ops if op.value is None]
    for op in ops:
        family, address = identify(op)
        note = namespace.deleted.add if op.value is None else namespace.deleted.discard
        note((family, namespace.indices[op.key.dev], address))
