"""The links themselves: reading what they have, and carrying out steps.

In the network namespace of the calling thread.  linux/rtnetlink.h, linux/if_bridge.h.
"""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from meshnet.errors import ConflictError, KernelRefusedError, NotFoundError
from meshnet.kernel.takeover import contents
from meshnet.kernel.takeover.contents import Contents, Kind, LinkObject
from meshnet.kernel.takeover.plan import Verb
from meshnet.kernel.wire import bulk, links, rtnl
from meshnet.state import ENDPOINT_LINK, LINK_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from meshnet.kernel.takeover.plan import Step
    from meshnet.kernel.wire.rtnl import Body, Request

_PROC_NET = Path("/proc/sys/net")
_SETTINGS = ("ipv4/conf", "ipv6/conf", "ipv4/neigh", "ipv6/neigh")
_GENERATES = "addr_gen_mode"
_LATE = (_GENERATES, "stable_secret")
"""Settings that would have the kernel make an address on the bridge: not copied."""
IFF_LOOPBACK = 0x8
IFLA_BR_FORWARD_DELAY, IFLA_BR_STP_STATE, IFLA_BR_MCAST_SNOOPING = 1, 5, 23
RTM_GETRULE, FRA_IIFNAME, FRA_OIFNAME = 34, 3, 17
_DETECTION_S = 3.0
"""To wait for duplicate address detection, which takes one to two (RFC 4862 §5.4)."""
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_NLM_F_APPEND = 0x800
_VERBS = {
    Kind.ADDRESS: (rtnl.RTM_NEWADDR, rtnl.RTM_DELADDR),
    Kind.NEIGHBOUR: (rtnl.RTM_NEWNEIGH, rtnl.RTM_DELNEIGH),
    Kind.NEXTHOP: (rtnl.RTM_NEWNEXTHOP, rtnl.RTM_DELNEXTHOP),
    Kind.ROUTE: (rtnl.RTM_NEWROUTE, rtnl.RTM_DELROUTE),
}


class LinkState(NamedTuple):
    """What decides whether a link can be taken over, and how its bridge is made."""

    ifindex: int
    mtu_bytes: int
    mac: bytes
    up: bool
    master: str


class Interfaces:
    """The host's links, by name.

    Raises:
        OSError: a netlink socket cannot be had.
    """

    def __init__(self) -> None:
        self._rtnl = rtnl.RtnlSocket()

    def close(self) -> None:
        """Close the socket; all else stays."""
        self._rtnl.close()

    # --- looking ------------------------------------------------------------------------------

    def find(self, name: str) -> LinkState | None:
        """A link; None: none has that name."""
        messages = self._rtnl.dump(rtnl.RTM_GETLINK, links.link_dump())
        by_index = {link.ifindex: link for link in map(links.decode_link, messages)}
        for link in by_index.values():
            if link.name == name:
                master = by_index.get(link.master)
                named = master.name if master is not None else str(link.master or "")
                return LinkState(link.ifindex, link.mtu_bytes, link.mac, link.up, named)
        return None

    def read(self, name: str) -> Contents:
        """All that a link has that can move; nothing if the link does not exist."""
        link = self.find(name)
        if link is None:
            return Contents()
        index = link.ifindex
        neighbours: list[Body] = []
        for flags in (0, contents.NTF_PROXY):
            for family in _FAMILIES:
                body = rtnl.NDMSG.pack(family, 0, 0, flags, 0)
                neighbours += self._rtnl.dump(rtnl.RTM_GETNEIGH, body)
        return Contents(
            contents.decode_addresses(self._dump_addresses(), index, name),
            contents.decode_neighbours(neighbours, index),
            contents.decode_nexthops(self._dump_nexthops(), index),
            contents.decode_routes(self._dump_routes(), index),
        )

    def check_movable(self, name: str) -> LinkState:
        """Look up a link, and refuse one whose contents cannot be moved to a bridge as they are.

        Waits for duplicate address detection that is under way.

        Raises:
            NotFoundError: the link does not exist.
            ConflictError: something on it would break; the message says what.
        """
        link = self.find(name)
        if link is None:
            raise NotFoundError(f"link {name} does not exist on this host")
        deadline = time.monotonic() + _DETECTION_S
        while self._has_tentative(link) and time.monotonic() < deadline:
            time.sleep(0.05)
        problem = self._find_obstacle(name, link)
        if problem is not None:
            raise ConflictError(f"link {name} cannot be taken over: {problem}")
        return link

    def _find_obstacle(self, name: str, link: LinkState) -> str | None:
        if name.startswith(LINK_PREFIX) and name[len(LINK_PREFIX) :][:1] in "bepsuv":
            return "it is one of meshnet's own"
        if len(link.mac) != 6 or name == "lo":
            return "it is not an Ethernet link"
        if not link.up:
            return "it is down: set it up"
        if link.master:
            return f"it is a port of {link.master}: give that one as --parent, or take it out"
        for other, kind in self._uppers(link.ifindex):
            if kind != b"vlan":
                return f"link {other} ({kind.decode() or 'unknown'}) is on it: remove that one"
        for message in self._dump_addresses():
            problem = contents.unmovable_address(message, link.ifindex)
            if problem is not None:
                return problem
        for route in contents.multipath_over(self._dump_routes(), link.ifindex):
            return f"{route} shares its packets between it and other links: use nexthop objects"
        for rule in self._rules_of(name):
            return f"policy rule {rule} names it (`ip rule`): remove the rule, or name addresses"
        return None

    def _has_tentative(self, link: LinkState) -> bool:
        return any(contents.is_tentative(m, link.ifindex) for m in self._dump_addresses())

    def _uppers(self, index: int) -> Iterable[tuple[str, bytes]]:
        """Links of this namespace that are on a link: name and kind."""
        for data, start, end in self._rtnl.dump(rtnl.RTM_GETLINK, links.link_dump()):
            attrs = rtnl.parse_attrs(data, start + 16, end)
            info = attrs.get(links.IFLA_LINKINFO, b"")
            kind = rtnl.parse_attrs(info, 0, len(info)).get(links.IFLA_INFO_KIND, b"")
            lower = attrs.get(links.IFLA_LINK, b"")
            # Of a veth pair IFLA_LINK is the peer, whose index may be another namespace's.
            if kind != b"veth\0" and lower == rtnl.U32.pack(index):
                name = attrs.get(links.IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace")
                yield name, kind.rstrip(b"\0")

    def _rules_of(self, name: str) -> Iterable[int]:
        """Priorities of policy rules that name a link."""
        for family in _FAMILIES:
            body = rtnl.RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
            for data, start, end in self._rtnl.dump(RTM_GETRULE, body):
                attrs = rtnl.parse_attrs(data, start + 12, end)
                if name.encode() + b"\0" in (attrs.get(FRA_IIFNAME), attrs.get(FRA_OIFNAME)):
                    yield contents.to_number(attrs.get(bulk.RTA_PRIORITY, b""))

    def _dump_addresses(self) -> list[Body]:
        return self._rtnl.dump(rtnl.RTM_GETADDR, links.address_dump())

    def _dump_routes(self) -> list[Body]:
        found: list[Body] = []
        for family in _FAMILIES:
            body = rtnl.RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
            found += self._rtnl.dump(rtnl.RTM_GETROUTE, body)
        return found

    def _dump_nexthops(self) -> list[Body]:
        with contextlib.suppress(OSError):  # before Linux 5.3 there are none
            return self._rtnl.dump(rtnl.RTM_GETNEXTHOP, bulk.nexthop_dump())
        return []

    # --- writing ------------------------------------------------------------------------------

    def make_bridge(self, name: str, parent: str, link: LinkState) -> None:
        """Make a bridge that looks to the network like its parent; up, but without ports.

        Raises:
            KernelRefusedError: the kernel refused.
        """
        data = (
            rtnl.attr(IFLA_BR_FORWARD_DELAY, rtnl.U32.pack(0))
            + rtnl.attr(IFLA_BR_STP_STATE, rtnl.U32.pack(0))
            + rtnl.attr(IFLA_BR_MCAST_SNOOPING, b"\0")
        )
        info = rtnl.attr(links.IFLA_INFO_KIND, b"bridge\0")
        info += rtnl.nested_attr(links.IFLA_INFO_DATA, data)
        body = (
            rtnl.IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
            + rtnl.attr(links.IFLA_IFNAME, name.encode() + b"\0")
            + rtnl.attr(links.IFLA_ADDRESS, link.mac)
            + rtnl.nested_attr(links.IFLA_LINKINFO, info)
        )
        flags = rtnl.NLM_F_CREATE | rtnl.NLM_F_EXCL
        self._must([rtnl.Request(rtnl.RTM_NEWLINK, flags, body)], [f"make bridge {name}"])
        index = self._index(name)
        # Set afterwards: a bridge ignores an MTU given at its creation, and follows its ports'.
        mtu = rtnl.IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0)
        mtu += rtnl.attr(links.IFLA_MTU, rtnl.U32.pack(link.mtu_bytes))
        self._must([rtnl.Request(rtnl.RTM_SETLINK, 0, mtu)], [f"MTU of bridge {name}"])
        self.set_generation(name, links.ADDR_GEN_NONE)
        _copy_settings(parent, name)
        self._must([links.encode_link_up(index)], [f"set bridge {name} up"])

    def set_generation(self, name: str, mode: int) -> None:
        """Set how the kernel makes IPv6 addresses on a link (IN6_ADDR_GEN_MODE_…)."""
        # May fail: a kernel without IPv6 has no such setting, and makes no addresses.
        self._rtnl.send_batch([links.encode_no_link_local(self._index(name), mode)])

    def remove(self, name: str) -> None:
        """Remove a link; idempotent.

        Raises:
            KernelRefusedError: the kernel refused.
        """
        if self.find(name) is not None:
            self._must([links.encode_link_delete(name)], [f"remove link {name}"])

    def has_endpoints(self, bridge: str) -> bool:
        """Whether endpoints hang on a bridge."""
        master = self.find(bridge)
        if master is None:
            return False
        messages = self._rtnl.dump(rtnl.RTM_GETLINK, links.link_dump())
        return any(
            link.master == master.ifindex and ENDPOINT_LINK.fullmatch(link.name)
            for link in map(links.decode_link, messages)
        )

    def carry_out(self, batches: Sequence[Sequence[Step]], parent: str, bridge: str) -> None:
        """Carry out batches, up to the first that the kernel refuses in part.

        Raises:
            KernelRefusedError: the kernel refused; what was done stays.
        """
        indices = {name: self._index(name) for name in (parent, bridge) if self.find(name)}
        for batch in batches:
            requests, words = [], []
            for step in batch:
                for request in _encode(step, indices, bridge):
                    requests.append(request)
                    words.append(str(step))
            self._must(requests, words)

    def _must(self, requests: Sequence[Request], words: Sequence[str]) -> None:
        errors = self._rtnl.send_batch(requests) if requests else {}
        if errors:
            first = min(errors)
            raise KernelRefusedError(f"{words[first]}: {errors[first]}")

    def _index(self, name: str) -> int:
        try:
            return socket.if_nametoindex(name)
        except OSError as error:
            raise NotFoundError(f"link {name} does not exist on this host") from error


def generation_of(name: str) -> int:
    """How the kernel makes IPv6 addresses on a link (IN6_ADDR_GEN_MODE_…)."""
    with contextlib.suppress(OSError):
        return int((_PROC_NET / "ipv6/conf" / name / _GENERATES).read_text())
    return links.ADDR_GEN_NONE


def _copy_settings(source: str, target: str) -> None:
    """Give a link the settings of another: those that can be written and differ."""
    for tree in _SETTINGS:
        directory = _PROC_NET / tree / source
        if not directory.is_dir():
            continue  # no IPv6
        for file in sorted(directory.iterdir()):
            if file.name in _LATE or file.with_name(f"{file.name}_ms").exists():
                continue  # the kernel warns of whoever uses a setting that has a finer one
            # Some can only be read, some only written, and one cannot be read until it is set.
            with contextlib.suppress(OSError):
                value = file.read_text()
                ours = _PROC_NET / tree / target / file.name
                if ours.read_text() != value:
                    ours.write_text(value)


def _encode(step: Step, indices: dict[str, int], bridge: str) -> list[Request]:
    moved = step.moved
    if moved is None:
        master = indices[bridge] if step.verb is Verb.ADD else 0
        body = rtnl.IFINFO.pack(socket.AF_UNSPEC, 0, indices[step.link], 0, 0)
        body += rtnl.attr(links.IFLA_MASTER, rtnl.U32.pack(master))
        return [rtnl.Request(rtnl.RTM_SETLINK, 0, body)]
    new, delete = _VERBS[moved.kind]
    if step.verb is Verb.DELETE:
        return [rtnl.Request(delete, 0, _body(moved, step.link, indices))]
    if moved.kind is Kind.ADDRESS and moved.family == socket.AF_INET6:
        # Duplicate address detection would keep the address unusable for a second, so it is made
        # without; the second request gives it the original's flags.
        made = moved.with_attr(links.IFA_FLAGS, rtnl.U32.pack(moved.flags | links.IFA_F_NODAD))
        return [
            rtnl.Request(new, rtnl.NLM_F_CREATE, _body(made, step.link, indices)),
            rtnl.Request(new, rtnl.NLM_F_REPLACE, _body(moved, step.link, indices)),
        ]
    # A route is appended: behind the other link's to the same destination, which counts until it
    # is removed.
    flags = rtnl.NLM_F_CREATE
    if moved.kind is Kind.ROUTE:
        flags |= _NLM_F_APPEND
    elif moved.kind is not Kind.ADDRESS:
        flags |= rtnl.NLM_F_REPLACE
    return [rtnl.Request(new, flags, _body(moved, step.link, indices))]


def _body(moved: LinkObject, link: str, indices: dict[str, int]) -> bytes:
    return contents.encode_body(moved, indices[link], link)
