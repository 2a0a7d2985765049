"""Members that userspace VTEPs talk to: the processes hold this table, not the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.errors import KernelRefusedError
from meshnet.state import LinkKind
from meshnet.tables import Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.kernel.drivers.namespace import HostNamespace
    from meshnet.kernel.vteps import VtepProcesses
    from meshnet.state import KernelState
    from meshnet.tables import Op


def must_have(vteps: VtepProcesses | None) -> VtepProcesses:
    """The userspace VTEPs.

    Raises:
        KernelRefusedError: this host has none.
    """
    if vteps is None:
        raise KernelRefusedError("this agent has no userspace VTEP")
    return vteps


class MemberDriver:
    """`meshnet.kernel.drivers.Driver` of members."""

    def __init__(self, namespace: HostNamespace, vteps: VtepProcesses | None) -> None:
        self._namespace = namespace
        self._vteps = vteps

    def dump(self, state: KernelState) -> None:
        """See `meshnet.kernel.drivers.Driver`."""
        if self._vteps is None:
            return
        for name, link in state.links.items():
            if link.kind is LinkKind.TUN and link.vxlan is not None:
                state.members.update(self._vteps.members(name))

    def write(self, ops: Sequence[Op]) -> list[Failure]:
        """Tell each userspace VTEP all its changes in one request, which it takes as a whole."""
        failures: list[Failure] = []
        by_tun: dict[str, list[Op]] = {}
        for op in ops:
            by_tun.setdefault(op.key.dev, []).append(op)
        for tun, its in by_tun.items():
            self._namespace.writes += len(its)
            try:
                must_have(self._vteps).update(tun, its)
            except KernelRefusedError as error:
                failures += [Failure(op, 0, str(error)) for op in its]
        return failures
