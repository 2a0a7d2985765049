"""Our links: bridges, VXLAN devices, macvlans, TUNs, and the host's halves of veth pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from meshnet.errors import KernelRefusedError, NotFoundError
from meshnet.kernel.drivers.members import must_have
from meshnet.kernel.drivers.sysctls import read_sysctl, write_sysctl
from meshnet.kernel.drivers.writing import write_each
from meshnet.state import (
    ENDPOINT_LINK,
    NETWORK_LINK,
    TUN_LINK,
    Link,
    LinkKind,
    format_ip,
    format_mac,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from meshnet.kernel.drivers.namespace import HostNamespace
    from meshnet.kernel.vteps import VtepProcesses
    from meshnet.kernel.wire.links import LinkInfo
    from meshnet.state import KernelState
    from meshnet.tables import Failure, Op

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


def is_ours(name: str) -> bool:
    """Whether a link of this name belongs to a network or an endpoint."""
    return bool(NETWORK_LINK.fullmatch(name) or ENDPOINT_LINK.fullmatch(name))


class LinkDriver:
    """`meshnet.kernel.drivers.Driver` of links.

    Its `dump` must come first: the others ask which links are there.
    """

    def __init__(self, namespace: HostNamespace, vteps: VtepProcesses | None) -> None:
        self._namespace = namespace
        self._vteps = vteps
        self._actual: dict[str, Link] = {}

    def dump(self, state: KernelState) -> None:
        """See `meshnet.kernel.drivers.Driver`."""
        self._namespace.look_at_links()
        names = self._namespace.names()
        for info in self._namespace.by_index.values():
            if info.kind is LinkKind.TUN:
                if TUN_LINK.fullmatch(info.name):
                    state.links[info.name] = self._look_at_tun(_to_link(info, names), info.name)
            elif info.kind is not None and is_ours(info.name):
                state.links[info.name] = _to_link(info, names)
        self._actual = dict(state.links)

    def _look_at_tun(self, link: Link, name: str) -> Link:
        """Describe a TUN as its process serves it, if we would start the same process.

        Otherwise it has no `vxlan`, differs from what is desired, and gets a new process.
        """
        if self._vteps is None:
            return link
        vtep = self._vteps.look(name)
        if vtep is None or vtep.mtu_bytes != link.mtu_bytes or not self._vteps.accepts(vtep):
            return link
        return link._replace(vxlan=vtep.vxlan, mac=vtep.mac)

    def write(self, ops: Sequence[Op]) -> list[Failure]:
        """See `meshnet.kernel.drivers.Driver`."""
        return write_each(self._namespace, self._write, ops)

    def _write(self, op: Op) -> None:
        if op.value is None:
            self._delete(op.key)
        else:
            self._set(op.key, op.value)

    def _delete(self, name: str) -> None:
        index = self._namespace.indices.pop(name, None)
        if index is not None:
            if self._actual.pop(name).kind is LinkKind.TUN:
                must_have(self._vteps).stop(name)
            self._namespace.iproute.link("del", index=index)
        # A bridge lets its ports go; they are not its, and live on.
        for port, link in self._actual.items():
            if link.master == name:
                self._actual[port] = link._replace(master="")

    def _set(self, name: str, link: Link) -> None:
        iproute, indices = self._namespace.iproute, self._namespace.indices
        current = self._actual.get(name) if name in indices else None
        if link.kind is LinkKind.TUN:
            self._serve_tun(name, link, current)
            return
        if current is None:
            self._create(name, link)
        index = indices[name]
        changes: dict[str, Any] = {}
        if current is not None:
            differs = current.mtu_bytes != link.mtu_bytes
        else:
            # A bridge follows its ports' MTU until somebody sets its own.  Given at creation, the
            # MTU does not count as set.
            differs = link.kind is LinkKind.BRIDGE
        if differs:
            changes["mtu"] = link.mtu_bytes
        if current is not None and link.mac is not None and current.mac != link.mac:
            changes["address"] = format_mac(link.mac)
        if link.master != (current.master if current is not None else ""):
            changes["master"] = indices[link.master] if link.master else 0
        if changes:
            iproute.link("set", index=index, **changes)
        left_bridge = "master" in changes  # then the kernel has forgotten its settings as a port
        if link.hairpin != (current is not None and current.hairpin and not left_bridge):
            iproute.port("set", index=index, mode=int(link.hairpin))
        # Before it goes up: no router advertisement must be heard in between.
        _write_sysctls(name, link)
        if link.up and (current is None or not current.up):
            iproute.link("set", index=index, state="up")

    def _serve_tun(self, name: str, link: Link, current: Link | None) -> None:
        """Have the right process serve the TUN: it makes the TUN and sets it up."""
        if link.vxlan is None or link.mac is None:
            raise KernelRefusedError(f"TUN {name} has nothing to serve")
        served = (link.vxlan, link.mac, link.mtu_bytes, True)
        if current is None or (current.vxlan, current.mac, current.mtu_bytes, current.up) != served:
            must_have(self._vteps).start(name, link.vxlan, link.mac, link.mtu_bytes)
        self._find_index(name)
        self._actual[name] = link
        _write_sysctls(name, link)

    def _create(self, name: str, link: Link) -> None:
        """Make a link, down: it must be configured before it goes up."""
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
            options["link"] = self._namespace.indices[link.parent]
        elif link.vxlan is not None:
            local = "vxlan_local" if len(link.vxlan.local) == 4 else "vxlan_local6"
            options |= {
                "kind": "vxlan",
                "vxlan_id": link.vxlan.vni,
                "vxlan_port": link.vxlan.port,
                "vxlan_learning": False,  # the FDB is ours: a packet must not change it
                local: format_ip(link.vxlan.local),
            }
        self._namespace.iproute.link("add", **options)
        self._find_index(name)
        self._actual[name] = Link(link.kind, link.mtu_bytes, link.mac, up=False)

    def _find_index(self, name: str) -> None:
        index = self._namespace.iproute.find_link(name)
        if index is None:
            raise KernelRefusedError(f"link {name} vanished while it was being made")
        self._namespace.indices[name] = index


def _to_link(info: LinkInfo, names: Mapping[int, str]) -> Link:
    kind = info.kind or LinkKind.VETH
    master = names.get(info.master, "") if info.master else ""
    sysctls: tuple[tuple[str, str, str], ...] = ()
    if kind is not LinkKind.VETH:
        sysctls = tuple(
            (family, key, value)
            for family, key in _LINK_SYSCTLS
            if (value := read_sysctl(f"net/{family}/conf/{info.name}/{key}"))
        )
    parent = names.get(info.lower, "")
    return Link(
        kind, info.mtu_bytes, info.mac, info.up, master, info.vxlan, sysctls, parent, info.hairpin
    )


def _write_sysctls(name: str, link: Link) -> None:
    for family, key, value in link.sysctls:
        path = f"net/{family}/conf/{name}/{key}"
        if read_sysctl(path) != value:
            write_sysctl(path, value)
