"""The real kernel: one host's network stack through netlink, /proc/sys and nftables.

Each table has a driver (`meshnet.kernel.drivers`), which is assigned here.  Links are made and
changed through pyroute2; tables with thousands of rows go through `meshnet.kernel.wire.bulk`.
Everything acts on the network namespace of the thread that makes the object, and all calls must
come from that thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshnet.kernel.capabilities import Capabilities
from meshnet.kernel.drivers.addresses import AddressDriver
from meshnet.kernel.drivers.firewall import ElementDriver, FirewallDriver
from meshnet.kernel.drivers.links import LinkDriver
from meshnet.kernel.drivers.members import MemberDriver
from meshnet.kernel.drivers.namespace import HostNamespace
from meshnet.kernel.drivers.neighbours import FdbDriver, NeighbourDriver
from meshnet.kernel.drivers.nft import NftTables
from meshnet.kernel.drivers.routes import NexthopDriver, RouteDriver
from meshnet.kernel.drivers.sysctls import SysctlDriver
from meshnet.kernel.ordering import carry_out
from meshnet.kernel.underlay import UnderlayObserver
from meshnet.state import KernelState
from meshnet.tables import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path as FilePath

    from meshnet.backends import Underlay, UnderlayPath
    from meshnet.kernel.drivers import Driver
    from meshnet.kernel.elements import WiredElements
    from meshnet.kernel.events import NeighbourId
    from meshnet.kernel.vteps import VtepProcesses
    from meshnet.model import IpAddress
    from meshnet.tables import Failure, Op


class NetlinkKernel:
    """`meshnet.kernel.Kernel` on Linux.

    Args:
        firewall_memory: file that remembers the nftables tables as loaded (`NftTables`).
        wired: elements of the endpoints that this host's wiring has connected.
        vteps: userspace VTEPs; None: this host has none.
        vxlan: None: find out whether the kernel has VXLAN; False: do not use it.
        nexthop_objects: None: find out whether the kernel has them; False: act as if it had none
            (for tests).

    Raises:
        OSError: a netlink socket cannot be had.
    """

    def __init__(
        self,
        firewall_memory: FilePath,
        wired: WiredElements,
        *,
        vteps: VtepProcesses | None = None,
        vxlan: bool | None = None,
        nexthop_objects: bool | None = None,
    ) -> None:
        namespace = HostNamespace()
        capabilities = Capabilities(namespace, vxlan=vxlan, nexthop_objects=nexthop_objects)
        self._namespace = namespace
        self._underlay = UnderlayObserver(namespace, capabilities)
        # In the order of dumping: links first, since the other drivers ask which links are there.
        self._drivers: dict[Table, Driver] = {
            Table.LINK: LinkDriver(namespace, vteps),
            Table.ADDRESS: AddressDriver(namespace),
            Table.NEIGHBOUR: NeighbourDriver(namespace),
            Table.FDB: FdbDriver(namespace),
            Table.MEMBER: MemberDriver(namespace, vteps),
            Table.NEXTHOP: NexthopDriver(namespace, capabilities),
            Table.ROUTE: RouteDriver(namespace),
            Table.SYSCTL: SysctlDriver(namespace),
            Table.FIREWALL: FirewallDriver(namespace, NftTables(firewall_memory), wired),
            Table.ELEMENT: ElementDriver(namespace, wired),
        }

    def close(self) -> None:
        """See `meshnet.kernel.Kernel`."""
        self._namespace.close()

    @property
    def writes(self) -> int:
        """See `meshnet.kernel.Kernel`."""
        return self._namespace.writes

    @property
    def deleted(self) -> set[NeighbourId]:
        """Neighbours and FDB entries deleted since the last dump and not set since (`EventFilter`).

        Any thread may read it.
        """
        return self._namespace.deleted

    @property
    def port_id(self) -> int:
        """Netlink address of the bulk socket: the sender in notifications of its own writes."""
        return self._namespace.rtnl.port_id

    @property
    def nft_port_id(self) -> int:
        """The same for the elements of nftables sets."""
        return self._namespace.nft.port_id

    def observe(self, underlay_ip: IpAddress | None, underlay_dev: str | None) -> Underlay:
        """See `meshnet.kernel.Kernel`."""
        return self._underlay.observe(underlay_ip, underlay_dev)

    def find_paths(self, addresses: Collection[IpAddress]) -> dict[IpAddress, UnderlayPath]:
        """See `meshnet.kernel.Kernel`."""
        return self._underlay.find_paths(addresses)

    def link_indices(self) -> Mapping[str, int]:
        """See `meshnet.kernel.Kernel`."""
        return dict(self._namespace.indices)

    def dump(self) -> KernelState:
        """See `meshnet.kernel.Kernel`."""
        # Before anything is dumped: a deletion by somebody else from now on must not pass for ours.
        self._namespace.deleted.clear()
        state = KernelState()
        for driver in self._drivers.values():
            driver.dump(state)
        return state

    def apply(
        self, ops: Sequence[Op], on_written: Callable[[int], None] | None = None
    ) -> list[Failure]:
        """See `meshnet.kernel.Kernel`."""
        return carry_out(ops, self._write_run, on_written)

    def _write_run(self, table: Table, ops: Sequence[Op]) -> list[Failure]:
        return self._drivers[table].write(ops)
