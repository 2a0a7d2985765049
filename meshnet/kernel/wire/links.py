"""Links and addresses: the few fields of a dump that meshnet looks at, and endpoints' links.

Every pass of the reconciler begins with dumps, and ``attach``, which makes an endpoint's link, has
a bound of 5 ms: so both go through `meshnet.kernel.wire.rtnl`.  The rare, complex requests
(bridges, VXLAN devices) go through pyroute2 in `meshnet.kernel.drivers.links`.

linux/if_link.h, linux/if_addr.h, linux/veth.h.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, NamedTuple

from meshnet.kernel.wire import rtnl
from meshnet.kernel.wire.rtnl import AF_BRIDGE, RT_SCOPE_UNIVERSE
from meshnet.state import LinkKind, Vxlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from ipaddress import IPv4Interface, IPv6Interface

    from meshnet.kernel.wire.rtnl import Body

IFF_UP, IFF_RUNNING, IFF_LOWER_UP = 0x1, 0x40, 0x10000
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER = 1, 3, 4, 5, 10
IFLA_PROTINFO, IFLA_LINKINFO, IFLA_NET_NS_FD, IFLA_AF_SPEC = 12, 18, 28, 26
IFLA_BRPORT_MODE = 4
IFLA_GSO_MAX_SIZE = 41
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
IFLA_MACVLAN_MODE, MACVLAN_MODE_BRIDGE = 1, 4
VETH_INFO_PEER = 1
IFLA_INET6_ADDR_GEN_MODE, ADDR_GEN_NONE = 8, 1
IFLA_VXLAN_ID, IFLA_VXLAN_LOCAL, IFLA_VXLAN_PORT, IFLA_VXLAN_LOCAL6 = 1, 4, 15, 17
IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_FLAGS = 1, 2, 4, 8
IFA_F_NODAD = 0x02

_KINDS = {
    b"vxlan": LinkKind.VXLAN,
    b"bridge": LinkKind.BRIDGE,
    b"veth": LinkKind.VETH,
    b"tun": LinkKind.TUN,
    b"macvlan": LinkKind.MACVLAN,
}


class LinkInfo(NamedTuple):
    """A link as the kernel has it, whoever made it.

    Attributes:
        kind: None for kinds that are never ours.
        master: ifindex of its bridge, or 0.
        hairpin: of a port of a bridge: see `encode_hairpin`.
        lower: of a macvlan, ifindex of the link that it is on, in that link's namespace; else 0.
    """

    ifindex: int
    name: str
    up: bool
    mtu_bytes: int
    mac: bytes
    master: int
    kind: LinkKind | None
    vxlan: Vxlan | None
    lower: int = 0
    hairpin: bool = False


class AddressInfo(NamedTuple):
    """An address as the kernel has it; packed.

    Attributes:
        peer: the other end's on a point-to-point link, else the same: the subnet is its.
    """

    ifindex: int
    address: bytes
    prefix_length: int
    scope: int
    peer: bytes


def link_dump() -> bytes:
    """Body of RTM_GETLINK for all links."""
    return rtnl.IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0)


def decode_link(body: Body) -> LinkInfo:
    """One link of a dump."""
    data, start, end = body
    _, _, index, flags, _ = rtnl.IFINFO.unpack_from(data, start)
    attrs = rtnl.parse_attrs(data, start + 16, end)
    info = _nested(attrs.get(IFLA_LINKINFO, b""))
    kind = _KINDS.get(info.get(IFLA_INFO_KIND, b"").rstrip(b"\0"))
    vxlan = None
    if kind is LinkKind.VXLAN:
        own = _nested(info.get(IFLA_INFO_DATA, b""))
        vxlan = Vxlan(
            rtnl.number_in(own, IFLA_VXLAN_ID),
            int.from_bytes(own.get(IFLA_VXLAN_PORT, b""), "big"),
            own.get(IFLA_VXLAN_LOCAL) or own.get(IFLA_VXLAN_LOCAL6, b""),
        )
    return LinkInfo(
        index,
        attrs.get(IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
        bool(flags & IFF_UP),
        rtnl.number_in(attrs, IFLA_MTU),
        attrs.get(IFLA_ADDRESS, b""),
        rtnl.number_in(attrs, IFLA_MASTER),
        kind,
        vxlan,
        rtnl.number_in(attrs, IFLA_LINK) if kind is LinkKind.MACVLAN else 0,
        _is_hairpin(info),
    )


def _is_hairpin(info: Mapping[int, bytes]) -> bool:
    if info.get(IFLA_INFO_SLAVE_KIND, b"").rstrip(b"\0") != b"bridge":
        return False
    return _nested(info.get(IFLA_INFO_SLAVE_DATA, b"")).get(IFLA_BRPORT_MODE, b"\0") == b"\1"


def address_dump() -> bytes:
    """Body of RTM_GETADDR for all addresses."""
    return rtnl.IFADDR.pack(socket.AF_UNSPEC, 0, 0, 0, 0)


def decode_addresses(bodies: Iterable[Body]) -> Iterator[AddressInfo]:
    """The IP addresses of a dump, which may have those of other families, too (MCTP, Phonet)."""
    for data, start, end in bodies:
        _, length, _, scope, index = rtnl.IFADDR.unpack_from(data, start)
        attrs = rtnl.parse_attrs(data, start + 8, end)
        # On point-to-point links IFA_ADDRESS is the peer's; IPv6 has IFA_LOCAL only there.
        address = attrs.get(IFA_LOCAL) or attrs.get(IFA_ADDRESS, b"")
        if len(address) in (4, 16):
            yield AddressInfo(index, address, length, scope, attrs.get(IFA_ADDRESS, address))


def encode_veth(
    name: str,
    *,
    master: int,
    mtu_bytes: int,
    peer_name: str,
    peer_mac: bytes,
    peer_netns_fd: int,
    peer_gso_max_bytes: int | None = None,
) -> rtnl.Request:
    """Create a veth pair: the host's end up and a port of a bridge, the other in a namespace.

    One request for all of it, since attach has a bound of 5 ms.

    Args:
        peer_gso_max_bytes: the largest super-packet that the namespace's end takes; the separate
            limit for IPv4, from Linux 6.3 on, follows this one.  None: the default.
    """
    peer = (
        rtnl.IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        + _string(IFLA_IFNAME, peer_name)
        + rtnl.attr(IFLA_MTU, rtnl.U32.pack(mtu_bytes))
        + rtnl.attr(IFLA_ADDRESS, peer_mac)
        + rtnl.attr(IFLA_NET_NS_FD, rtnl.U32.pack(peer_netns_fd))
    )
    if peer_gso_max_bytes is not None:
        peer += rtnl.attr(IFLA_GSO_MAX_SIZE, rtnl.U32.pack(peer_gso_max_bytes))
    data = rtnl.attr(VETH_INFO_PEER, peer)
    info = _string(IFLA_INFO_KIND, "veth") + rtnl.nested_attr(IFLA_INFO_DATA, data)
    body = (
        rtnl.IFINFO.pack(socket.AF_UNSPEC, 0, 0, IFF_UP, IFF_UP)
        + _string(IFLA_IFNAME, name)
        + rtnl.attr(IFLA_MTU, rtnl.U32.pack(mtu_bytes))
        + rtnl.attr(IFLA_MASTER, rtnl.U32.pack(master))
        + rtnl.nested_attr(IFLA_LINKINFO, info)
    )
    return rtnl.Request(rtnl.RTM_NEWLINK, rtnl.NLM_F_CREATE | rtnl.NLM_F_EXCL, body)


def encode_macvlan(
    name: str, *, lower: int, mtu_bytes: int, mac: bytes, netns_fd: int
) -> rtnl.Request:
    """Create a macvlan on a link of this namespace, directly in another namespace, down.

    In bridge mode, so that endpoints of one host reach each other without the physical switch.

    Args:
        lower: ifindex of the link that it is on.
    """
    mode = rtnl.attr(IFLA_MACVLAN_MODE, rtnl.U32.pack(MACVLAN_MODE_BRIDGE))
    info = _string(IFLA_INFO_KIND, "macvlan") + rtnl.nested_attr(IFLA_INFO_DATA, mode)
    body = (
        rtnl.IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        + _string(IFLA_IFNAME, name)
        + rtnl.attr(IFLA_MTU, rtnl.U32.pack(mtu_bytes))
        + rtnl.attr(IFLA_ADDRESS, mac)
        + rtnl.attr(IFLA_LINK, rtnl.U32.pack(lower))
        + rtnl.attr(IFLA_NET_NS_FD, rtnl.U32.pack(netns_fd))
        + rtnl.nested_attr(IFLA_LINKINFO, info)
    )
    return rtnl.Request(rtnl.RTM_NEWLINK, rtnl.NLM_F_CREATE | rtnl.NLM_F_EXCL, body)


def encode_no_link_local(index: int, mode: int = ADDR_GEN_NONE) -> rtnl.Request:
    """Set how the kernel gives a link an IPv6 link-local address: by default not at all.

    Args:
        mode: IN6_ADDR_GEN_MODE_….
    """
    generation = rtnl.attr(IFLA_INET6_ADDR_GEN_MODE, bytes((mode,)))
    spec = rtnl.nested_attr(socket.AF_INET6, generation)
    body = rtnl.IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0)
    return rtnl.Request(rtnl.RTM_SETLINK, 0, body + rtnl.nested_attr(IFLA_AF_SPEC, spec))


def encode_hairpin(index: int) -> rtnl.Request:
    """Let a bridge send packets back to the port that they came from.

    Where bridges pass their packets to nftables (``bridge-nf-call-iptables``), a packet from an
    endpoint to its own published port is translated within the bridge, and must return by the port
    that it came from.
    """
    port = rtnl.attr(IFLA_BRPORT_MODE, b"\1")
    body = rtnl.IFINFO.pack(AF_BRIDGE, 0, index, 0, 0)
    return rtnl.Request(rtnl.RTM_SETLINK, 0, body + rtnl.nested_attr(IFLA_PROTINFO, port))


def encode_link_up(index: int) -> rtnl.Request:
    """Set a link up."""
    return rtnl.Request(
        rtnl.RTM_SETLINK, 0, rtnl.IFINFO.pack(socket.AF_UNSPEC, 0, index, IFF_UP, IFF_UP)
    )


def encode_link_rename(index: int, name: str) -> rtnl.Request:
    """Rename a link, which must be down."""
    body = rtnl.IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0) + _string(IFLA_IFNAME, name)
    return rtnl.Request(rtnl.RTM_SETLINK, 0, body)


def encode_link_delete(name: str) -> rtnl.Request:
    """Delete a link by name; with one end of a veth pair the other goes, too."""
    body = rtnl.IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _string(IFLA_IFNAME, name)
    return rtnl.Request(rtnl.RTM_DELLINK, 0, body)


def encode_address(interface: IPv4Interface | IPv6Interface, index: int) -> rtnl.Request:
    """Add an address; IPv6 without duplicate address detection, so that it works at once."""
    packed = interface.ip.packed
    prefix_length = interface.network.prefixlen
    family = socket.AF_INET if interface.version == 4 else socket.AF_INET6
    body = rtnl.IFADDR.pack(family, prefix_length, 0, RT_SCOPE_UNIVERSE, index)
    body += rtnl.attr(IFA_LOCAL, packed) + rtnl.attr(IFA_ADDRESS, packed)
    if interface.version == 4:
        body += rtnl.attr(IFA_BROADCAST, interface.network.broadcast_address.packed)
    else:
        body += rtnl.attr(IFA_FLAGS, rtnl.U32.pack(IFA_F_NODAD))
    return rtnl.Request(rtnl.RTM_NEWADDR, rtnl.NLM_F_CREATE | rtnl.NLM_F_EXCL, body)


def _nested(data: bytes) -> dict[int, bytes]:
    return rtnl.parse_attrs(data, 0, len(data))


def _string(kind: int, text: str) -> bytes:
    return rtnl.attr(kind, text.encode() + b"\0")
