"""Nexthop objects, and the routes of the main table that lead to them or elsewhere."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from meshnet.kernel.drivers.writing import write_packed
from meshnet.kernel.wire import bulk, rtnl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.kernel.capabilities import Capabilities
    from meshnet.kernel.drivers.namespace import HostNamespace
    from meshnet.state import KernelState
    from meshnet.tables import Failure, Op


class NexthopDriver:
    """`meshnet.kernel.drivers.Driver` of nexthop objects in our range of ids."""

    def __init__(self, namespace: HostNamespace, capabilities: Capabilities) -> None:
        self._namespace = namespace
        self._capabilities = capabilities

    def dump(self, state: KernelState) -> None:
        """See `meshnet.kernel.drivers.Driver`."""
        if self._capabilities.has_nexthop_objects():
            messages = self._namespace.rtnl.dump(rtnl.RTM_GETNEXTHOP, bulk.nexthop_dump())
            nexthops, foreign = bulk.decode_nexthops(messages, self._namespace.names())
            state.nexthops.update(nexthops)
            state.foreign_nexthop_ids = frozenset(foreign)

    def write(self, ops: Sequence[Op]) -> list[Failure]:
        """See `meshnet.kernel.drivers.Driver`."""
        return write_packed(self._namespace, bulk.encode_nexthops, ops)


class RouteDriver:
    """`meshnet.kernel.drivers.Driver` of routes with our protocol number."""

    def __init__(self, namespace: HostNamespace) -> None:
        self._namespace = namespace

    def dump(self, state: KernelState) -> None:
        """See `meshnet.kernel.drivers.Driver`."""
        names = self._namespace.names()
        for family in (socket.AF_INET, socket.AF_INET6):
            messages = self._namespace.rtnl.dump(rtnl.RTM_GETROUTE, bulk.route_dump(family))
            state.routes.update(bulk.decode_routes(messages, names))

    def write(self, ops: Sequence[Op]) -> list[Failure]:
        """See `meshnet.kernel.drivers.Driver`."""
        return write_packed(self._namespace, bulk.encode_routes, ops)
