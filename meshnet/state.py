"""Kernel state as values: what a host should hold, and what a dump says it holds.

Both have the same shape, so `meshnet.diff` compares tables without knowing what they mean.
Addresses and MACs of the big tables are packed bytes in network byte order: 10,000 peers have
40,000 of them, and an ``ipaddress`` object costs as much as the rest of decoding a message.
Interfaces go by name; the edge knows their indices.

Pure: imports no socket, file, clock or trio.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from enum import IntEnum
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshnet.firewall import Firewall, Unknown

PackedIp = bytes
"""An IPv4 (4 bytes) or IPv6 (16 bytes) address in network byte order."""

LINK_PREFIX = "mn"
"""Prefix of the names of all our links."""

NETWORK_LINK = re.compile(LINK_PREFIX + r"[bsuv][0-9]+")
"""Names of a network's own links: ``mnb4097``, its bridge, ``mnv4097``, its VXLAN device,
``mnu4097``, the TUN of its userspace VTEP, ``mns4097``, the macvlan by which a host reaches its own
endpoints."""

TUN_LINK = re.compile(LINK_PREFIX + r"u[0-9]+")
"""Names of the TUNs among these."""

ENDPOINT_LINK = re.compile(LINK_PREFIX + r"e[0-9a-f]{12}")
"""Names of the host-side links of endpoints."""


def endpoint_link_name(endpoint_id: str) -> str:
    """Name of the host-side link of an endpoint: 15 characters, as many as the kernel allows."""
    return f"{LINK_PREFIX}e{endpoint_id}"


ROUTE_PROTOCOL = 109
"""``rtm_protocol`` and ``nh_protocol`` of our objects (free in linux/rtnetlink.h)."""

NEXTHOP_ID_FIRST = 0x6D00_0000
NEXTHOP_ID_LAST = 0x6DFF_FFFF
"""Our range of nexthop object ids."""


class LinkKind(IntEnum):
    """The kinds of links that we make in a host's namespace."""

    VXLAN = 1
    BRIDGE = 2
    VETH = 3
    TUN = 4
    MACVLAN = 5


class Vxlan(NamedTuple):
    """Parameters of a VTEP.

    To change one takes a new VXLAN device, or for a TUN a new process.
    """

    vni: int
    port: int
    local: PackedIp


class Link(NamedTuple):
    """A link of ours.

    Attributes:
        mtu_bytes: MTU without the Ethernet header.
        mac: 6 bytes; None: any (a dump always fills it in, a desired veth leaves it open).  Of a
            TUN: the VTEP's, which its process writes into frames.
        master: name of the bridge it is a port of, or "".
        vxlan: of a VXLAN device; of a TUN, as its process serves it, None while no process does.
        sysctls: per-interface settings, such as ("ipv4", "forwarding", "1"); a dump has more of
            them than are desired.
        parent: of a macvlan: name of the link that it is on; "" if that is gone.
        hairpin: of a port of a bridge: whether the bridge may send a packet back to the port it
            came from (`meshnet.kernel.wire.links.encode_hairpin`).
    """

    kind: LinkKind
    mtu_bytes: int
    mac: bytes | None
    up: bool = True
    master: str = ""
    vxlan: Vxlan | None = None
    sysctls: tuple[tuple[str, str, str], ...] = ()
    parent: str = ""
    hairpin: bool = False


class AddressKey(NamedTuple):
    """An address on a link of ours."""

    dev: str
    address: PackedIp
    prefix_length: int


class NeighbourKey(NamedTuple):
    """A permanent neighbour; its value is the link-layer address (6 bytes)."""

    dev: str
    address: PackedIp


class FdbKey(NamedTuple):
    """A forwarding entry of a VXLAN device; its value is the remote VTEP's underlay address."""

    dev: str
    mac: bytes


class MemberKey(NamedTuple):
    """A host that a userspace VTEP exchanges packets with, by its underlay address."""

    dev: str
    underlay_ip: PackedIp


class Member(NamedTuple):
    """What a userspace VTEP knows about a member.

    Attributes:
        mac: of the member's VTEP.
        subnets: subnets behind it, as packed prefix and length, IPv4 first.
        port: UDP port of its VTEP.
        offload: whether it accepts unfinished inner checksums (`meshnet.wire.vxlan`).
    """

    mac: bytes
    subnets: tuple[tuple[PackedIp, int], ...]
    port: int
    offload: bool


class Nexthop(NamedTuple):
    """A gateway on a link: the kernel takes it to be there, without a look-up (``RTNH_F_ONLINK``).

    In `Route.via` the gateway may be b"": packets go to the link itself.
    """

    dev: str
    gateway: PackedIp


class ElementKey(NamedTuple):
    """An element of a named set of our nftables tables; its value is b"", or of a map its target.

    Key and value are the kernel's bytes (`meshnet.firewall.elements`).
    """

    set_name: str
    key: bytes


class Ruleset(NamedTuple):
    """All that loading our nftables tables takes: what they do, and the elements of their sets."""

    firewall: Firewall | Unknown
    elements: Mapping[ElementKey, bytes]


class RouteKey(NamedTuple):
    """Destination of a route of ours in the main table.

    Attributes:
        metric: None: the one that all our routes have, 0 (IPv6: 1024).  A number: somebody else
            made the route, with our protocol number; no desired state has one.
    """

    prefix: PackedIp
    prefix_length: int
    metric: int | None = None


class Route(NamedTuple):
    """The target of a route: a nexthop object, a gateway or link named in the route, or nothing.

    Attributes:
        nexthop_id: the nexthop object, or 0.
        source: preferred source address of the host's own packets, or b"".
        via: the gateway, on kernels without nexthop objects, or the TUN of a userspace VTEP.  A
            route with neither a nexthop object nor this is ``unreachable``.
    """

    nexthop_id: int
    source: PackedIp = b""
    via: Nexthop | None = None


@dataclass(slots=True)
class KernelState:
    """All tables of one host, ours only.

    Attributes:
        addresses: present ones map to True.
        nexthops: by nexthop id.
        foreign_nexthop_ids: ids in our range that belong to someone else (dumps only).
        sysctls: by path under /proc/sys, for interfaces that are not ours.
        firewall: our nftables tables without the elements of their named sets; None: they do not
            exist; unknown: they are not as we left them.
        elements: of the named sets.
    """

    links: dict[str, Link] = field(default_factory=dict)
    addresses: dict[AddressKey, bool] = field(default_factory=dict)
    neighbours: dict[NeighbourKey, bytes] = field(default_factory=dict)
    fdb: dict[FdbKey, PackedIp] = field(default_factory=dict)
    members: dict[MemberKey, Member] = field(default_factory=dict)
    nexthops: dict[int, Nexthop] = field(default_factory=dict)
    routes: dict[RouteKey, Route] = field(default_factory=dict)
    sysctls: dict[str, str] = field(default_factory=dict)
    firewall: Firewall | Unknown | None = None
    elements: dict[ElementKey, bytes] = field(default_factory=dict)
    foreign_nexthop_ids: frozenset[int] = frozenset()

    def copy(self) -> KernelState:
        """A copy that shares no table with this one."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        own: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in values}
        return KernelState(**own)


def format_ip(packed: PackedIp) -> str:
    """The usual text form of a packed address."""
    if len(packed) == 4:
        first, second, third, fourth = packed  # as `ipaddress` does it, in a tenth of the time
        return f"{first}.{second}.{third}.{fourth}"
    return str(ip_address(packed))


def format_mac(mac: bytes) -> str:
    """The usual text form of a MAC address, such as ``02:6d:0a:2a:01:00``."""
    return mac.hex(":")
