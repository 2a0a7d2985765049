"""The kernel in memory: a verified fake of Linux, for tests and simulations.

Job: behave as `meshnet.kernel.netlink.NetlinkKernel` does, with what Linux does of its own accord
(a link that goes takes its addresses, neighbours, FDB entries, nexthops and routes along), without
a network namespace, so that many agents in one trio run have a host each.  It passes the same
contract tests (``tests/contract/test_kernel.py``), can be told to fail, and can be changed behind
the agent's back.  Place: tests only; never in production.  Endpoints: `memory_wiring`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from meshnet.backends import HostLink, Occupant, Underlay, UnderlayPath
from meshnet.errors import NotFoundError
from meshnet.kernel.elements import WiredElements
from meshnet.kernel.fakes.faults import Faults, RefusedError
from meshnet.kernel.ordering import carry_out
from meshnet.state import KernelState, Link, LinkKind
from meshnet.tables import Failure, Op, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from meshnet.model import IpAddress
    from meshnet.state import AddressKey, ElementKey, Nexthop, Route, RouteKey

_ALL_IPV6 = "net/ipv6/conf/all/forwarding"
_LINK_DEFAULTS = {
    ("ipv4", "arp_ignore"): "0",
    ("ipv4", "forwarding"): "0",
    ("ipv4", "rp_filter"): "0",
    ("ipv4", "route_localnet"): "0",
    ("ipv6", "accept_dad"): "1",
    ("ipv6", "accept_ra"): "1",
    ("ipv6", "addr_gen_mode"): "0",
    ("ipv6", "disable_ipv6"): "0",
}


@dataclass
class Foreign:
    """What belongs to others and stands where something of ours could.

    Attributes:
        links: names of links of kinds that are never ours.
        nexthops: ids of nexthop objects in our range.
        routes: destinations, in the main table and with our metric.
    """

    links: set[str] = field(default_factory=set)
    nexthops: set[int] = field(default_factory=set)
    routes: set[RouteKey] = field(default_factory=set)


class MemoryKernel(Faults):
    """`meshnet.kernel.Kernel` in memory.

    Args:
        underlay_ips: the addresses of `dev`.
        nexthop_objects: False: as Linux before 5.3.

    Attributes:
        foreign: what others hold; change it with its sets' own methods.
        host_links: the host's links that are not ours, by name.
        occupied: what the host's links and routes lead to.
        routed: paths to peers that are not reached on-link by `dev`; None: no way to go.
        wired: elements of connected endpoints, for its `MemoryWiring`.
        on_change: called, if set, after every change `by_hand`, as the kernel would notify.
    """

    def __init__(
        self,
        *underlay_ips: IpAddress,
        dev: str = "eth0",
        mtu_bytes: int = 1500,
        nexthop_objects: bool = True,
    ) -> None:
        self.foreign = Foreign()
        self.routed: dict[IpAddress, UnderlayPath | None] = {}
        self.on_change: Callable[[], None] | None = None
        self.wired = WiredElements()
        self.writes = 0
        self.underlay_ips = sorted(underlay_ips, key=lambda ip: ip.version)
        self.underlay_dev = dev
        self.underlay_mtu_bytes = mtu_bytes
        self.host_links = {dev: HostLink(mtu_bytes, frozenset(underlay_ips))}
        self.occupied: tuple[Occupant, ...] = ()
        self._nexthop_objects = nexthop_objects
        super().__init__()
        self._indices: dict[str, int] = {}
        self._next_index = itertools.count(2)  # 1 is the loopback link's
        self._state = KernelState(
            sysctls={
                f"net/ipv4/conf/{dev}/forwarding": "0",
                f"net/ipv6/conf/{dev}/accept_ra": "1",
                "net/ipv6/conf/default/accept_ra": "1",
                _ALL_IPV6: "0",
            }
        )

    def close(self) -> None:
        """See `meshnet.kernel.Kernel`."""

    # --- looking ------------------------------------------------------------------------------

    def observe(self, underlay_ip: IpAddress | None, underlay_dev: str | None) -> Underlay:
        """See `meshnet.kernel.Kernel`."""
        dev = self.underlay_dev
        held = [ip for ip in self.underlay_ips if underlay_dev == dev or underlay_ip == ip]
        held.sort(key=lambda ip: ip != underlay_ip)
        if not held or underlay_dev not in (None, dev):
            raise NotFoundError(f"underlay {underlay_ip or underlay_dev} is not on this host")
        sysctls = self._state.sysctls
        listens = sysctls[_ALL_IPV6] == "0"
        values = {name: sysctls[f"net/ipv6/conf/{name}/accept_ra"] for name in (dev, "default")}
        return Underlay(
            ip=held[0],
            dev=dev,
            mtu_bytes=self.underlay_mtu_bytes,
            links=dict(self.host_links),
            occupied=self.occupied,
            forwarding_links=(dev,),
            ra_links=tuple(n for n, v in values.items() if v == "2" or (v == "1" and listens)),
            nexthop_objects=self._nexthop_objects,
        )

    def find_paths(self, addresses: Collection[IpAddress]) -> dict[IpAddress, UnderlayPath]:
        """See `meshnet.kernel.Kernel`."""
        versions = {ip.version for ip in self.underlay_ips}
        on_link = UnderlayPath(self.underlay_dev, True, self.underlay_mtu_bytes)
        paths = {a: self.routed.get(a, on_link) for a in addresses if a.version in versions}
        return {address: path for address, path in paths.items() if path is not None}

    def link_indices(self) -> Mapping[str, int]:
        """See `meshnet.kernel.Kernel`."""
        names = self.host_links.keys() | self._state.links.keys() | self.foreign.links
        self._indices = {name: i for name, i in self._indices.items() if name in names}
        for name in sorted(names - self._indices.keys()):
            self._indices[name] = next(self._next_index)
        return dict(self._indices)

    def dump(self) -> KernelState:
        """See `meshnet.kernel.Kernel`."""
        return replace(self._state.copy(), foreign_nexthop_ids=frozenset(self.foreign.nexthops))

    # --- writing ------------------------------------------------------------------------------

    def apply(
        self, ops: Sequence[Op], on_written: Callable[[int], None] | None = None
    ) -> list[Failure]:
        """See `meshnet.kernel.Kernel`."""
        return carry_out(ops, self._write_run, on_written)

    def by_hand(self, table: Table, key: Any, value: Any) -> None:  # noqa: ANN401
        """Set an object (or with None delete it) as another program would; then notify.

        A ruleset with the text "" is tables that are not as they were loaded.  A link that another
        link's `Link` value is given for changes as it says; ``up=False`` sets it down.
        """
        self._write(Op(table, key, value, True))
        if self.on_change is not None:
            self.on_change()

    def _write_run(self, table: Table, ops: Sequence[Op]) -> list[Failure]:
        failures = []
        if table is Table.ELEMENT:
            ops = self.wired.still_right(ops)
        for op in ops:
            self.writes += 1
            try:
                self.meet(op.table)
                self._write(op)
            except RefusedError as refused:
                failures.append(Failure(op, refused.code, str(refused)))
        return failures

    def _write(self, op: Op) -> None:
        state, key, value = self._state, op.key, op.value
        match op.table:
            case Table.FIREWALL if value is None:
                state.firewall, state.elements = None, {}
            case Table.FIREWALL:
                text, elements = self.wired.bring_up_to_date(value)
                state.firewall, state.elements = text, dict(elements)
            case Table.ELEMENT if value is None:
                _pop(state.elements, key, errno.ENOENT)
            case Table.ELEMENT:
                self._set_element(key, value)
            case Table.SYSCTL:
                state.sysctls[key] = value
            case Table.LINK if value is None:
                self._delete_link(key)
            case Table.LINK:
                self._set_link(key, value)
            case Table.ADDRESS if value is None:
                self._delete_address(key)
            case Table.ADDRESS:
                self._add_address(key)
            case Table.NEIGHBOUR:
                self._set_on_link(state.neighbours, key, value)
            case Table.FDB:
                self._set_on_link(state.fdb, key, value)
            case Table.MEMBER:
                self._set_on_link(state.members, key, value)
            case Table.NEXTHOP if value is None:
                self._delete_nexthops({key} & state.nexthops.keys())
            case Table.NEXTHOP:
                self._set_nexthop(key, value, exists=op.exists)
            case Table.ROUTE if value is None:
                _pop(state.routes, key, errno.ESRCH)
            case _:
                self._set_route(key, value, exists=op.exists)

    # --- links and what hangs on them ---------------------------------------------------------

    def _set_element(self, key: ElementKey, value: bytes) -> None:
        if self._state.firewall is None:
            raise RefusedError(errno.ENOENT)
        self._state.elements[key] = value

    def _set_link(self, name: str, link: Link) -> None:
        if name in self.foreign.links:
            raise RefusedError(errno.EEXIST)
        links = self._state.links
        if link.master and link.master not in links:
            raise RefusedError(errno.ENODEV, f"no link {link.master}")
        if link.parent and link.parent not in self.host_links:
            raise RefusedError(errno.ENODEV, f"no link {link.parent}")
        now = links.get(name)
        if now is None and link.kind is LinkKind.VETH:
            raise RefusedError(errno.ENODEV, "the other end is in a namespace")
        known = _LINK_DEFAULTS if now is None else {(f, k): v for f, k, v in now.sysctls}
        settings = known | {(f, k): v for f, k, v in link.sysctls}
        links[name] = link._replace(
            mac=link.mac or (now.mac if now is not None else None),
            sysctls=()
            if link.kind is LinkKind.VETH
            else tuple((f, k, v) for (f, k), v in settings.items()),
        )
        if now is not None and (now.mac != links[name].mac or not link.up):
            self._flush_neighbours(name)
        if now is not None and not link.up:
            self._delete_ways_over(name)
        if not link.up or settings.get(("ipv6", "disable_ipv6")) == "1":
            for address in [a for a in self._state.addresses if a.dev == name]:
                if len(address.address) == 16:
                    self._delete_address(address)

    def write_elements(self, ops: Sequence[Op]) -> None:
        """For `MemoryWiring`: elements of an endpoint; without tables there is nothing to do."""
        for op in ops:
            with contextlib.suppress(RefusedError):
                self._write(op)

    def add_endpoint_link(self, name: str, link: Link) -> None:
        """For `MemoryWiring`: the host's half of a veth pair comes up."""
        self._state.links[name] = link

    def remove_endpoint_link(self, name: str) -> None:
        """For `MemoryWiring`: a veth pair goes.  Idempotent."""
        self._state.links.pop(name, None)
        self._indices.pop(name, None)

    def _delete_link(self, name: str) -> None:
        state = self._state
        _pop(state.links, name, errno.ENODEV)
        self._indices.pop(name, None)
        for port, link in list(state.links.items()):
            if link.master == name:
                state.links[port] = link._replace(master="")
        self._flush_neighbours(name)
        for entry in [k for k in state.fdb if k.dev == name]:
            del state.fdb[entry]
        for member in [k for k in state.members if k.dev == name]:
            del state.members[member]
        self._delete_ways_over(name)
        for address in [a for a in state.addresses if a.dev == name]:
            self._delete_address(address)

    def _flush_neighbours(self, name: str) -> None:
        for neighbour in [k for k in self._state.neighbours if k.dev == name]:
            del self._state.neighbours[neighbour]

    def _delete_ways_over(self, name: str) -> None:
        state = self._state
        self._delete_nexthops({i for i, n in state.nexthops.items() if n.dev == name})
        for key in [k for k, r in state.routes.items() if r.via is not None and r.via.dev == name]:
            del state.routes[key]

    def _need_link(self, dev: str, *, up: bool = False) -> None:
        link = self._state.links.get(dev)
        if link is None and dev != self.underlay_dev:
            raise RefusedError(errno.ENODEV)
        if up and link is not None and not link.up:
            raise RefusedError(errno.ENETDOWN, "Nexthop device is not up")

    def _set_on_link(self, table: dict[Any, Any], key: Any, value: Any) -> None:  # noqa: ANN401
        self._need_link(key.dev)
        if value is None:
            _pop(table, key, errno.ENOENT)
        else:
            table[key] = value

    def _add_address(self, key: AddressKey) -> None:
        self._need_link(key.dev)
        if key in self._state.addresses:
            raise RefusedError(errno.EEXIST)
        self._state.addresses[key] = True

    def _delete_address(self, key: AddressKey) -> None:
        """IPv4 routes with it as their preferred source go along; IPv6 ones keep it."""
        state = self._state
        _pop(state.addresses, key, errno.EADDRNOTAVAIL)
        if len(key.address) == 4 and not any(a.address == key.address for a in state.addresses):
            for prefix in [k for k, r in state.routes.items() if r.source == key.address]:
                del state.routes[prefix]

    # --- nexthops and routes ------------------------------------------------------------------

    def _set_nexthop(self, nexthop_id: int, nexthop: Nexthop, *, exists: bool) -> None:
        if not self._nexthop_objects:
            raise RefusedError(errno.EOPNOTSUPP)
        if nexthop_id in self.foreign.nexthops or (
            not exists and nexthop_id in self._state.nexthops
        ):
            raise RefusedError(errno.EEXIST)
        self._need_link(nexthop.dev, up=True)
        self._state.nexthops[nexthop_id] = nexthop

    def _delete_nexthops(self, ids: Collection[int]) -> None:
        if not ids:
            return
        state = self._state
        for nexthop_id in ids:
            del state.nexthops[nexthop_id]
        for key in [k for k, route in state.routes.items() if route.nexthop_id in ids]:
            del state.routes[key]

    def _set_route(self, key: RouteKey, route: Route, *, exists: bool) -> None:
        state = self._state
        if key in self.foreign.routes or (not exists and key in state.routes):
            raise RefusedError(errno.EEXIST)
        nexthop = route.via
        if route.nexthop_id:
            nexthop = state.nexthops.get(route.nexthop_id)
            if nexthop is None:
                raise RefusedError(errno.EINVAL, "Nexthop id does not exist")
        elif nexthop is not None:
            self._need_link(nexthop.dev, up=True)
        if nexthop is not None:
            if nexthop.gateway and len(nexthop.gateway) != len(key.prefix):
                raise RefusedError(errno.EINVAL, "Nexthop has another address family")
            if route.source and not any(a.address == route.source for a in state.addresses):
                raise RefusedError(errno.EINVAL, "Invalid prefsrc address")
        state.routes[key] = route


def _pop(table: dict[Any, Any], key: Any, code: int) -> None:  # noqa: ANN401
    if key not in table:
        raise RefusedError(code)
    del table[key]
