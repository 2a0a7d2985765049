"""The real kernel: one host's network stack through netlink, /proc/sys and nftables.

Links are made and changed through pyroute2; all that comes in thousands goes through
`meshnet.kernel.wire.bulk`.  Everything acts on the network namespace of the thread that makes the
object, and all calls must come from that thread.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from meshnet.backends import HostLink, Path, Underlay
from meshnet.errors import KernelRefusedError, NotFoundError
from meshnet.firewall import Firewall
from meshnet.kernel.drivers.nft import NftTables
from meshnet.kernel.elements import are_wired
from meshnet.kernel.ordering import carry_out
from meshnet.kernel.wire import bulk, links, rtnl
from meshnet.kernel.wire.nftnl import NftSocket
from meshnet.state import (
    ENDPOINT_LINK,
    NETWORK_LINK,
    TUN_LINK,
    AddressKey,
    KernelState,
    Link,
    LinkKind,
    format_ip,
    format_mac,
)
from meshnet.tables import Failure, Op, Table

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from meshnet.kernel.elements import WiredElements
    from meshnet.kernel.events import NeighbourId
    from meshnet.kernel.vteps import VtepProcesses
    from meshnet.kernel.wire.links import LinkInfo
    from meshnet.model import IpAddress
    from meshnet.state import Ruleset

_PROC_SYS = FilePath("/proc/sys")
_PROBE = "mnprobe"
_ALL_IPV6 = "net/ipv6/conf/all/forwarding"
_OUTSIDE = (IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1"))
"""Documentation addresses (RFC 5737, RFC 3849): their route is that of any address outside."""
_LINK_SYSCTLS = (
    ("ipv4", "arp_ignore"),
    ("ipv4", "forwarding"),
    ("ipv4", "rp_filter"),
    ("ipv4", "route_localnet"),
    ("ipv6", "accept_dad"),
    ("ipv6", "accept_ra"),
    ("ipv6", "addr_gen_mode"),
    ("ipv6", "disable_ipv6"),
)
_Encoder = Callable[[Sequence[Op], Mapping[str, int], int], list[bytes]]
_BULK_ENCODERS: dict[Table, _Encoder] = {
    Table.NEIGHBOUR: bulk.encode_neighbours,
    Table.FDB: bulk.encode_fdb,
    Table.NEXTHOP: bulk.encode_nexthops,
    Table.ROUTE: bulk.encode_routes,
}


class NetlinkKernel:
    """`meshnet.kernel.Kernel` on Linux.

    Args:
        firewall_memory: file that remembers the nftables tables as loaded (`NftTables`).
        wired: elements of the endpoints that this host's wiring has connected.
        vteps: userspace VTEPs; None: this host has none.
        vxlan: None: find out whether the kernel has VXLAN; False: do not use it.
        nexthop_objects: None: find out whether the kernel has them; False: do as if it had none,
            which is for tests.

    Attributes:
        deleted: neighbours and FDB entries that were deleted since the last dump and not set since
            (`EventFilter`); may be looked at from any thread.

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
        self._rtnl = rtnl.RtnlSocket()
        with contextlib.ExitStack() as undo:
            undo.callback(self._rtnl.close)
            self._nft_socket = NftSocket()
            undo.callback(self._nft_socket.close)
            self._iproute: Any = IPRoute()
            undo.pop_all()
        self._nft = NftTables(firewall_memory)
        self._wired = wired
        self._vteps = vteps
        self._vxlan = vxlan
        self._nexthop_objects = nexthop_objects
        self._indices: dict[str, int] = {}
        self._by_index: dict[int, LinkInfo] = {}
        self._forwarding_links: tuple[str, ...] = ()
        self._actual: dict[str, Link] = {}
        self.writes = 0
        self.deleted: set[NeighbourId] = set()

    def close(self) -> None:
        """See `meshnet.kernel.Kernel`."""
        self._rtnl.close()
        self._nft_socket.close()
        self._iproute.close()

    @property
    def port_id(self) -> int:
        """Netlink address of the bulk socket: the sender in notifications of its own writes."""
        return self._rtnl.port_id

    @property
    def nft_port_id(self) -> int:
        """The same of nftables' elements."""
        return self._nft_socket.port_id

    # --- looking ------------------------------------------------------------------------------

    def observe(self, underlay_ip: IpAddress | None, underlay_dev: str | None) -> Underlay:
        """See `meshnet.kernel.Kernel`."""
        self._dump_links()
        held = self._dump_global_addresses()
        ip, link = self._find_underlay(held, underlay_ip, underlay_dev)
        outside = [path.dev for path in self.find_paths(_OUTSIDE).values()]
        self._forwarding_links = tuple(sorted({link.name, *outside} - {"lo"}))
        listens = _read_sysctl(_ALL_IPV6) == "0"
        return Underlay(
            ip=ip,
            dev=link.name,
            mtu_bytes=link.mtu_bytes,
            links=self._host_links(held),
            forwarding_links=self._forwarding_links,
            ra_links=tuple(
                dev
                for dev in self._forwarding_links
                if listens and _read_sysctl(f"net/ipv6/conf/{dev}/accept_ra") == "1"
            ),
            ipv6=(_PROC_SYS / _ALL_IPV6).exists(),
            strict_rp_filter=_read_sysctl("net/ipv4/conf/all/rp_filter") == "1",
            nexthop_objects=self._has_nexthop_objects(),
            kernel_vxlan=self._has_vxlan(),
        )

    def find_paths(self, addresses: Collection[IpAddress]) -> dict[IpAddress, Path]:
        """See `meshnet.kernel.Kernel`."""
        packed = [a.packed for a in addresses]
        answers = self._rtnl.ask(bulk.encode_route_lookups(packed, self._rtnl.next_sequence))
        # Thousands of peers are behind a few routes, whose description is the same for all.
        routes = {answer for answer in answers if isinstance(answer, bytes)}
        ways = {route: bulk.decode_route_lookup(route) for route in routes}
        if not self._by_index.keys() >= {way[0] for way in ways.values() if way is not None}:
            self._dump_links()
        by_route = {route: self._to_path(way) for route, way in ways.items() if way is not None}
        found = {}
        for address, answer in zip(addresses, answers, strict=True):
            path = by_route.get(answer) if isinstance(answer, bytes) else None
            if path is not None:
                found[address] = path
        return found

    def link_indices(self) -> Mapping[str, int]:
        """See `meshnet.kernel.Kernel`."""
        return dict(self._indices)

    def _to_path(self, way: tuple[int, bool, int]) -> Path | None:
        ifindex, on_link, mtu_bytes = way
        out = self._by_index.get(ifindex)
        return Path(out.name, on_link, mtu_bytes or out.mtu_bytes) if out is not None else None

    def _has_nexthop_objects(self) -> bool:
        if self._nexthop_objects is None:
            # An id that nobody has: Linux before 5.3 does not even know the type of the message.
            (answer,) = self._rtnl.ask([bulk.encode_nexthop_probe(self._rtnl.next_sequence)])
            refusal = answer.errno if isinstance(answer, rtnl.KernelError) else 0
            self._nexthop_objects = refusal != errno.EOPNOTSUPP
        return self._nexthop_objects

    def _host_links(self, held: Iterable[tuple[IpAddress, LinkInfo]]) -> dict[str, HostLink]:
        addresses: dict[str, set[IpAddress]] = {}
        for ip, link in held:
            addresses.setdefault(link.name, set()).add(ip)
        return {
            link.name: HostLink(link.mtu_bytes, frozenset(addresses.get(link.name, ())))
            for link in self._by_index.values()
            if not _is_ours(link.name)
        }

    def _dump_global_addresses(self) -> list[tuple[IpAddress, LinkInfo]]:
        """All addresses of global scope and the links that hold them."""
        held: list[tuple[IpAddress, LinkInfo]] = []
        messages = self._rtnl.dump(rtnl.RTM_GETADDR, links.address_dump())
        for info in links.decode_addresses(messages):
            if info.ifindex in self._by_index and info.scope == links.RT_SCOPE_UNIVERSE:
                held.append((ip_address(info.address), self._by_index[info.ifindex]))
        return held

    def _find_underlay(
        self,
        held: list[tuple[IpAddress, LinkInfo]],
        wanted: IpAddress | None,
        dev: str | None,
    ) -> tuple[IpAddress, LinkInfo]:
        for ip, link in sorted(held, key=lambda item: (item[0] != wanted, item[0].version)):
            if ip == wanted if dev is None else self._is_or_has_port(link, dev):
                return ip, link
        if dev is None:
            raise NotFoundError(
                f"underlay address {wanted} is on no link of this host: "
                "give --underlay-ip an address that `ip addr` shows"
            )
        raise NotFoundError(
            f"link {dev} does not exist or has no global address: "
            "give --underlay-dev a link that `ip addr` shows with one"
        )

    def _is_or_has_port(self, link: LinkInfo, dev: str) -> bool:
        """Whether the link is `dev`, or the bridge that has `dev` for a port, and its addresses."""
        return link.name == dev or any(
            port.name == dev and self._by_index.get(port.master) is link
            for port in self._by_index.values()
        )

    def _has_vxlan(self) -> bool:
        """Whether the kernel can make a VXLAN device: found out by making one, if none is there."""
        if self._vxlan is None:
            self._vxlan = (
                any(link.kind is LinkKind.VXLAN for link in self._by_index.values()) or None
            )
        if self._vxlan is None:
            try:
                self._iproute.link("add", ifname=_PROBE, kind="vxlan", vxlan_id=1, vxlan_port=1)
                self._iproute.link("del", ifname=_PROBE)
            except NetlinkError as error:
                if error.code not in (errno.EOPNOTSUPP, errno.ENODEV):
                    return True
                self._vxlan = False
            else:
                self._vxlan = True
        return self._vxlan

    def _dump_links(self) -> list[LinkInfo]:
        messages = self._rtnl.dump(rtnl.RTM_GETLINK, links.link_dump())
        found = [links.decode_link(m) for m in messages]
        self._indices = {link.name: link.ifindex for link in found}
        self._by_index = {link.ifindex: link for link in found}
        return found

    def dump(self) -> KernelState:
        """See `meshnet.kernel.Kernel`."""
        self.deleted.clear()
        state = KernelState()
        everything = self._dump_links()
        names = {link.ifindex: link.name for link in everything}
        for link in everything:
            if link.kind is LinkKind.TUN:
                if TUN_LINK.fullmatch(link.name):
                    self._dump_vtep(state, link, names)
            elif link.kind is not None and _is_ours(link.name):
                state.links[link.name] = _to_link(link, names)
        self._actual = dict(state.links)
        self._dump_addresses(state, names)
        for name, own in state.links.items():
            if own.kind is LinkKind.VXLAN:
                self._dump_tunnel(state, name)
        if self._has_nexthop_objects():
            messages = self._rtnl.dump(rtnl.RTM_GETNEXTHOP, bulk.nexthop_dump())
            state.nexthops, foreign = bulk.decode_nexthops(messages, names)
            state.foreign_nexthop_ids = frozenset(foreign)
        for family in (socket.AF_INET, socket.AF_INET6):
            messages = self._rtnl.dump(rtnl.RTM_GETROUTE, bulk.route_dump(family))
            state.routes.update(bulk.decode_routes(messages, names))
        for path in self._sysctl_paths():
            state.sysctls[path] = _read_sysctl(path)
        state.firewall = self._nft.read()
        state.elements = self._nft_socket.dump_elements()
        return state

    def _dump_vtep(self, state: KernelState, info: LinkInfo, names: dict[int, str]) -> None:
        """A TUN of ours is what its process makes of it, if that is one as we would start."""
        link = _to_link(info, names)
        vteps = self._vteps
        if vteps is not None:
            vtep, wanted = vteps.look(info.name), (link.mtu_bytes, vteps.engine)
            if vtep is not None and (vtep.mtu_bytes, vtep.engine) == wanted:
                link = link._replace(vxlan=vtep.vxlan, mac=vtep.mac)
                state.members |= vteps.members(info.name)
        state.links[info.name] = link

    def _dump_addresses(self, state: KernelState, names: dict[int, str]) -> None:
        messages = self._rtnl.dump(rtnl.RTM_GETADDR, links.address_dump())
        for info in links.decode_addresses(messages):
            if info.scope != links.RT_SCOPE_UNIVERSE:
                continue
            dev = names.get(info.ifindex, "")
            if dev in state.links and state.links[dev].kind is not LinkKind.VETH:
                state.addresses[AddressKey(dev, info.address, info.prefix_length)] = True

    def _dump_tunnel(self, state: KernelState, dev: str) -> None:
        index = self._indices[dev]
        body = bulk.neighbour_dump(socket.AF_UNSPEC, index)
        messages = self._rtnl.dump(rtnl.RTM_GETNEIGH, body)
        state.neighbours.update(bulk.decode_neighbours(messages, dev, index))
        body = bulk.neighbour_dump(bulk.AF_BRIDGE, index)
        messages = self._rtnl.dump(rtnl.RTM_GETNEIGH, body)
        state.fdb.update(bulk.decode_fdb(messages, dev, index))

    def _sysctl_paths(self) -> Iterable[str]:
        for dev in self._forwarding_links:
            yield f"net/ipv4/conf/{dev}/forwarding"
            yield f"net/ipv6/conf/{dev}/accept_ra"
        yield _ALL_IPV6

    # --- writing ------------------------------------------------------------------------------

    def apply(
        self, ops: Sequence[Op], on_written: Callable[[int], None] | None = None
    ) -> list[Failure]:
        """See `meshnet.kernel.Kernel`."""
        return carry_out(ops, self._write_run, on_written)

    def _write_run(self, table: Table, ops: Sequence[Op]) -> list[Failure]:
        if table is Table.MEMBER:
            return self._write_members(ops)
        if table is Table.ELEMENT:
            return self._write_elements(ops)
        encode = _BULK_ENCODERS.get(table)
        return self._write_each(ops) if encode is None else self._write_bulk(encode, ops)

    def _write_elements(self, ops: Sequence[Op]) -> list[Failure]:
        # Thousands of members must not hold up an attach.
        with self._wired.lock if are_wired(ops) else contextlib.nullcontext():
            right = self._wired.still_right(ops)
            self.writes += len(right)
            return self._nft_socket.write_elements(right)

    def _load_firewall(self, ruleset: Ruleset) -> None:
        with self._wired.lock:
            counts = self._nft_socket.dump_counters()
            held = self._wired.bring_up_to_date(ruleset).elements
            assert isinstance(ruleset.firewall, Firewall)
            self._nft.load(ruleset.firewall, held, counts)

    def _write_members(self, ops: Sequence[Op]) -> list[Failure]:
        """Tell the userspace VTEPs, each all it is to know in one request."""
        failures: list[Failure] = []
        by_tun: dict[str, list[Op]] = {}
        for op in ops:
            by_tun.setdefault(op.key.dev, []).append(op)
        for tun, its in by_tun.items():
            self.writes += len(its)
            try:
                self._need_vteps().update(tun, its)
            except KernelRefusedError as error:
                failures += [Failure(op, 0, str(error)) for op in its]
        return failures

    def _need_vteps(self) -> VtepProcesses:
        if self._vteps is None:
            raise KernelRefusedError("this agent has no userspace VTEP")
        return self._vteps

    def _write_bulk(self, encode: _Encoder, ops: Sequence[Op]) -> list[Failure]:
        failures: list[Failure] = []
        try:
            messages = encode(ops, self._indices, self._rtnl.next_sequence)
        except KeyError:
            ops, failures = self._leave_out_linkless(encode, ops)
            messages = encode(ops, self._indices, self._rtnl.next_sequence)
        self.writes += len(messages)
        self._note_deletions(ops)
        for i, refusal in sorted(self._rtnl.send_packed(messages).items()):
            failures.append(Failure(ops[i], refusal.errno, str(refusal)))
        return failures

    def _note_deletions(self, ops: Sequence[Op]) -> None:
        """Keep `deleted` current, before the kernel tells of it."""
        if not self.deleted:
            ops = [op for op in ops if op.value is None]  # a start makes 20,000 and deletes none
        for op in ops:
            if op.table is Table.NEIGHBOUR:
                family, address = bulk.family_of(op.key.address), op.key.address
            elif op.table is Table.FDB:
                family, address = bulk.AF_BRIDGE, op.key.mac
            else:
                return  # all are on one table
            note = self.deleted.add if op.value is None else self.deleted.discard
            note((family, self._indices[op.key.dev], address))

    def _leave_out_linkless(
        self, encode: _Encoder, ops: Sequence[Op]
    ) -> tuple[list[Op], list[Failure]]:
        good, failures = [], []
        for op in ops:
            try:
                encode([op], self._indices, 0)
                good.append(op)
            except KeyError as error:
                failures.append(Failure(op, 0, f"link {error.args[0]} does not exist"))
        return good, failures

    def _write_each(self, ops: Sequence[Op]) -> list[Failure]:
        failures = []
        for op in ops:
            self.writes += 1
            try:
                self._write_one(op)
            except NetlinkError as error:
                failures.append(Failure(op, error.code, str(error.args[-1])))
            except OSError as error:
                failures.append(Failure(op, error.errno or 0, str(error)))
            except (KernelRefusedError, NotFoundError) as error:
                failures.append(Failure(op, 0, str(error)))
            except KeyError as error:
                failures.append(Failure(op, 0, f"link {error.args[0]} does not exist"))
        return failures

    def _write_one(self, op: Op) -> None:
        match op.table:
            case Table.LINK if op.value is None:
                self._delete_link(op.key)
            case Table.LINK:
                self._set_link(op.key, op.value)
            case Table.ADDRESS:
                self._write_address(op.key, delete=op.value is None)
            case Table.SYSCTL:
                (_PROC_SYS / op.key).write_text(op.value)
            case Table.FIREWALL if op.value is None:
                self._nft.delete()
            case _:
                self._load_firewall(op.value)

    def _delete_link(self, name: str) -> None:
        index = self._indices.pop(name, None)
        if index is not None:
            if self._actual.pop(name).kind is LinkKind.TUN:
                self._need_vteps().stop(name)
            self._iproute.link("del", index=index)
        for port, link in self._actual.items():
            if link.master == name:
                self._actual[port] = link._replace(master="")

    def _set_link(self, name: str, link: Link) -> None:
        current = self._actual.get(name) if name in self._indices else None
        if link.kind is LinkKind.TUN:
            self._serve_tun(name, link, current)
            return
        if current is None:
            self._create_link(name, link)
            self._actual[name] = Link(link.kind, link.mtu_bytes, link.mac, up=False)
        index = self._indices[name]
        changes: dict[str, Any] = {}
        if current is not None:
            differs = current.mtu_bytes != link.mtu_bytes
        else:
            # A bridge follows its ports' MTU until it is set one, which at creation does not count.
            differs = link.kind is LinkKind.BRIDGE
        if differs:
            changes["mtu"] = link.mtu_bytes
        if current is not None and link.mac is not None and current.mac != link.mac:
            changes["address"] = format_mac(link.mac)
        if link.master != (current.master if current is not None else ""):
            changes["master"] = self._indices[link.master] if link.master else 0
        if changes:
            self._iproute.link("set", index=index, **changes)
        left_bridge = "master" in changes  # and what it was as a port is forgotten
        if link.hairpin != (current is not None and current.hairpin and not left_bridge):
            self._iproute.brport("set", index=index, mode=int(link.hairpin))
        _write_sysctls(name, link)
        if link.up and (current is None or not current.up):
            self._iproute.link("set", index=index, state="up")

    def _serve_tun(self, name: str, link: Link, current: Link | None) -> None:
        """Have the VTEP's process as wanted: it makes the TUN and sets it up."""
        if link.vxlan is None or link.mac is None:
            raise KernelRefusedError(f"TUN {name} has nothing to serve")
        served = (link.vxlan, link.mac, link.mtu_bytes, True)
        if current is None or (current.vxlan, current.mac, current.mtu_bytes, current.up) != served:
            self._need_vteps().start(name, link.vxlan, link.mac, link.mtu_bytes)
        self._find_index(name)
        self._actual[name] = link
        _write_sysctls(name, link)

    def _create_link(self, name: str, link: Link) -> None:
        """Make a link, down: it is configured before it goes up."""
        options: dict[str, Any] = {"ifname": name}
        if link.kind is not LinkKind.BRIDGE:
            options["mtu"] = link.mtu_bytes
        if link.mac is not None:
            options["address"] = format_mac(link.mac)
        if link.kind is LinkKind.VETH:
            raise NotFoundError(f"endpoint link {name} is gone")
        if link.kind is LinkKind.BRIDGE:
            options |= {"kind": "bridge", "br_stp_state": 0, "br_mcast_snooping": 0}
        elif link.kind is LinkKind.MACVLAN:
            options |= {"kind": "macvlan", "macvlan_mode": "bridge"}
            options["link"] = self._indices[link.parent]
        elif link.vxlan is not None:
            local = "vxlan_local" if len(link.vxlan.local) == 4 else "vxlan_local6"
            options |= {
                "kind": "vxlan",
                "vxlan_id": link.vxlan.vni,
                "vxlan_port": link.vxlan.port,
                "vxlan_learning": False,
                local: format_ip(link.vxlan.local),
            }
        self._iproute.link("add", **options)
        self._find_index(name)

    def _find_index(self, name: str) -> None:
        found = self._iproute.link_lookup(ifname=name)
        if not found:
            raise KernelRefusedError(f"link {name} vanished while it was made")
        self._indices[name] = int(found[0])

    def _write_address(self, key: AddressKey, *, delete: bool) -> None:
        options: dict[str, Any] = {
            "index": self._indices[key.dev],
            "address": format_ip(key.address),
            "prefixlen": key.prefix_length,
        }
        if len(key.address) == 16 and not delete:
            options["flags"] = links.IFA_F_NODAD
        self._iproute.addr("del" if delete else "add", **options)


def _is_ours(name: str) -> bool:
    return bool(NETWORK_LINK.fullmatch(name) or ENDPOINT_LINK.fullmatch(name))


def _to_link(info: LinkInfo, names: dict[int, str]) -> Link:
    kind = info.kind or LinkKind.VETH
    master = names.get(info.master, "") if info.master else ""
    sysctls: tuple[tuple[str, str, str], ...] = ()
    if kind is not LinkKind.VETH:
        sysctls = tuple(
            (family, key, value)
            for family, key in _LINK_SYSCTLS
            if (value := _read_sysctl(f"net/{family}/conf/{info.name}/{key}"))
        )
    parent = names.get(info.lower, "")
    return Link(
        kind, info.mtu_bytes, info.mac, info.up, master, info.vxlan, sysctls, parent, info.hairpin
    )


def _write_sysctls(name: str, link: Link) -> None:
    for family, key, value in link.sysctls:
        path = f"net/{family}/conf/{name}/{key}"
        if _read_sysctl(path) != value:
            (_PROC_SYS / path).write_text(value)


def _read_sysctl(path: str) -> str:
    with contextlib.suppress(OSError):
        return (_PROC_SYS / path).read_text().strip()
    return ""
