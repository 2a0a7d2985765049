"""Changes behind the agent's back, on Linux and in memory, and where they must show."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from meshnet.firewall import UNKNOWN
from meshnet.firewall.elements import member
from meshnet.state import (
    NEXTHOP_ID_FIRST,
    AddressKey,
    ElementKey,
    FdbKey,
    NeighbourKey,
    Nexthop,
    Route,
    RouteKey,
    Ruleset,
)
from meshnet.tables import Table
from tests.contract.hosts import UNDERLAY_DEV

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.kernel.fakes.kernel import MemoryKernel

BRIDGE, TUNNEL = "mnb4097", "mnv4097"
MAC2 = bytes.fromhex("026d0a2a0100")  # VTEP of 10.42.1.0/24, host h2's
NEIGHBOUR4 = NeighbourKey(TUNNEL, bytes((10, 42, 1, 0)))
NEIGHBOUR6 = NeighbourKey(TUNNEL, bytes.fromhex("fe80000000000000006d0afffe2a0100"))
GATEWAY4 = AddressKey(BRIDGE, bytes((10, 42, 0, 1)), 24)
GATEWAY6 = AddressKey(BRIDGE, bytes.fromhex("fd000042000000000000000000000001"), 64)
FDB2 = FdbKey(TUNNEL, MAC2)
ROUTE4, ROUTE6 = (
    RouteKey(bytes((10, 42, 1, 0)), 24),
    RouteKey(b"\xfd\0\0\x42\0\0\0\1" + bytes(8), 64),
)
MEMBER2 = member(ip_address("10.9.0.2"))
CIDR4 = RouteKey(bytes((10, 42, 0, 0)), 16)


class ByHand(NamedTuple):
    """One change; `seen_in`: the tables of the operations that it takes to undo it."""

    label: str
    command: str
    in_memory: Callable[[MemoryKernel], None]
    seen_in: set[Table]


def change_link(name: str, **changes: object) -> Callable[[MemoryKernel], None]:
    def change(kernel: MemoryKernel) -> None:
        kernel.by_hand(Table.LINK, name, kernel.dump().links[name]._replace(**changes))  # type: ignore[arg-type]

    return change


def _set(table: Table, key: object, value: object) -> Callable[[MemoryKernel], None]:
    return lambda kernel: kernel.by_hand(table, key, value)


def _link_sysctl(name: str, *setting: str) -> Callable[[MemoryKernel], None]:
    def change(kernel: MemoryKernel) -> None:
        change_link(name, sysctls=(setting,))(kernel)

    return change


def _flush_members(kernel: MemoryKernel) -> None:
    for key in kernel.dump().elements:
        if key.set_name == MEMBER2.set_name:
            kernel.by_hand(Table.ELEMENT, key, None)


def _first_nexthop(value: Nexthop | None) -> Callable[[MemoryKernel], None]:
    return _set(Table.NEXTHOP, NEXTHOP_ID_FIRST, value)


T = Table
CHANGES = [
    ByHand("tunnel deleted", f"ip link del {TUNNEL}", _set(T.LINK, TUNNEL, None),
           {T.LINK, T.NEIGHBOUR, T.FDB, T.NEXTHOP, T.ROUTE}),
    ByHand("bridge deleted", f"ip link del {BRIDGE}", _set(T.LINK, BRIDGE, None),
           {T.LINK, T.ADDRESS, T.ROUTE}),
    ByHand("tunnel down", f"ip link set {TUNNEL} down", change_link(TUNNEL, up=False),
           {T.LINK, T.NEIGHBOUR, T.NEXTHOP, T.ROUTE}),
    ByHand("bridge down", f"ip link set {BRIDGE} down", change_link(BRIDGE, up=False),
           {T.LINK, T.ADDRESS}),
    ByHand("tunnel's MAC", f"ip link set {TUNNEL} address 02:00:00:00:00:01",
           change_link(TUNNEL, mac=b"\2\0\0\0\0\1"), {T.LINK, T.NEIGHBOUR}),
    ByHand("bridge's MAC", f"ip link set {BRIDGE} address 02:00:00:00:00:01",
           change_link(BRIDGE, mac=b"\2\0\0\0\0\1"), {T.LINK}),
    ByHand("tunnel's MTU", f"ip link set {TUNNEL} mtu 1300", change_link(TUNNEL, mtu_bytes=1300),
           {T.LINK}),
    ByHand("tunnel made a port", f"ip link set {TUNNEL} master {BRIDGE}",
           change_link(TUNNEL, master=BRIDGE), {T.LINK}),
    ByHand("forwarding off", f"echo 0 > /proc/sys/net/ipv4/conf/{BRIDGE}/forwarding",
           _link_sysctl(BRIDGE, "ipv4", "forwarding", "0"), {T.LINK}),
    ByHand("strict rp_filter", f"echo 1 > /proc/sys/net/ipv4/conf/{TUNNEL}/rp_filter",
           _link_sysctl(TUNNEL, "ipv4", "rp_filter", "1"), {T.LINK}),
    ByHand("IPv6 off", f"echo 1 > /proc/sys/net/ipv6/conf/{BRIDGE}/disable_ipv6",
           _link_sysctl(BRIDGE, "ipv6", "disable_ipv6", "1"), {T.LINK, T.ADDRESS}),
    ByHand("underlay forwarding off", f"echo 0 > /proc/sys/net/ipv4/conf/{UNDERLAY_DEV}/forwarding",
           _set(T.SYSCTL, f"net/ipv4/conf/{UNDERLAY_DEV}/forwarding", "0"), {T.SYSCTL}),
    ByHand("IPv4 address", f"ip addr del 10.42.0.1/24 dev {BRIDGE}",
           _set(T.ADDRESS, GATEWAY4, None), {T.ADDRESS, T.ROUTE}),
    ByHand("IPv6 address", f"ip addr del fd00:42::1/64 dev {BRIDGE}",
           _set(T.ADDRESS, GATEWAY6, None), {T.ADDRESS}),
    ByHand("another address", f"ip addr add 10.42.0.99/24 dev {BRIDGE}",
           _set(T.ADDRESS, AddressKey(BRIDGE, bytes((10, 42, 0, 99)), 24), True), {T.ADDRESS}),
    ByHand("neighbour deleted", f"ip neigh del 10.42.1.0 dev {TUNNEL}",
           _set(T.NEIGHBOUR, NEIGHBOUR4, None), {T.NEIGHBOUR}),
    ByHand("neighbour changed", f"ip neigh replace 10.42.1.0 dev {TUNNEL} lladdr 02:0:0:0:0:9",
           _set(T.NEIGHBOUR, NEIGHBOUR4, b"\2\0\0\0\0\x09"), {T.NEIGHBOUR}),
    ByHand("neighbour made reachable",
           f"ip neigh replace 10.42.1.0 dev {TUNNEL} lladdr 02:6d:0a:2a:01:00 nud reachable",
           _set(T.NEIGHBOUR, NEIGHBOUR4, None), {T.NEIGHBOUR}),
    ByHand("IPv6 neighbour deleted", f"ip neigh del fe80::6d:aff:fe2a:100 dev {TUNNEL}",
           _set(T.NEIGHBOUR, NEIGHBOUR6, None), {T.NEIGHBOUR}),
    ByHand("another neighbour", f"ip neigh add 10.42.9.0 dev {TUNNEL} lladdr 02:0:0:0:0:9",
           _set(T.NEIGHBOUR, NeighbourKey(TUNNEL, bytes((10, 42, 9, 0))), b"\2\0\0\0\0\x09"),
           {T.NEIGHBOUR}),
    ByHand("FDB entry deleted", f"bridge fdb del 02:6d:0a:2a:01:00 dev {TUNNEL}",
           _set(T.FDB, FDB2, None), {T.FDB}),
    ByHand("FDB entry changed",
           f"bridge fdb replace 02:6d:0a:2a:01:00 dev {TUNNEL} dst 10.9.0.77 self permanent",
           _set(T.FDB, FDB2, bytes((10, 9, 0, 77))), {T.FDB}),
    ByHand("another FDB entry",
           f"bridge fdb add 02:0:0:0:0:9 dev {TUNNEL} dst 10.9.0.77 self permanent",
           _set(T.FDB, FdbKey(TUNNEL, b"\2\0\0\0\0\x09"), bytes((10, 9, 0, 77))), {T.FDB}),
    ByHand("nexthop deleted", f"ip nexthop del id {NEXTHOP_ID_FIRST}", _first_nexthop(None),
           {T.NEXTHOP, T.ROUTE}),
    ByHand("nexthop changed",
           f"ip nexthop replace id {NEXTHOP_ID_FIRST} via 10.42.7.0 dev {TUNNEL} onlink proto 109",
           _first_nexthop(Nexthop(TUNNEL, bytes((10, 42, 7, 0)))), {T.NEXTHOP}),
    ByHand("route deleted", "ip route del 10.42.1.0/24", _set(T.ROUTE, ROUTE4, None), {T.ROUTE}),
    ByHand("IPv6 route deleted", "ip -6 route del fd00:42:0:1::/64", _set(T.ROUTE, ROUTE6, None),
           {T.ROUTE}),
    ByHand("route made unreachable", "ip route replace unreachable 10.42.1.0/24 proto 109",
           _set(T.ROUTE, ROUTE4, Route(0)), {T.ROUTE}),
    ByHand("unreachable route deleted", "ip route del unreachable 10.42.0.0/16",
           _set(T.ROUTE, CIDR4, None), {T.ROUTE}),
    ByHand("another route", "ip route add unreachable 10.42.9.0/24 proto 109",
           _set(T.ROUTE, RouteKey(bytes((10, 42, 9, 0)), 24), Route(0)), {T.ROUTE}),
    ByHand("table deleted", "nft delete table inet meshnet", _set(T.FIREWALL, "", None),
           {T.FIREWALL}),
    ByHand("the bridges' table deleted", "nft delete table bridge meshnet",
           _set(T.FIREWALL, "", Ruleset(UNKNOWN, {})), {T.FIREWALL}),
    ByHand("ruleset flushed", "nft flush ruleset", _set(T.FIREWALL, "", None), {T.FIREWALL}),
    ByHand("member deleted", "nft delete element inet meshnet members4 { 10.9.0.2 }",
           _set(T.ELEMENT, MEMBER2, None), {T.ELEMENT}),
    ByHand("another member", "nft add element inet meshnet members4 { 10.9.0.77 }",
           _set(T.ELEMENT, member(ip_address("10.9.0.77")), b""), {T.ELEMENT}),
    ByHand("everybody a member", "nft 'add element inet meshnet members4 { * }'",
           _set(T.ELEMENT, ElementKey("members4", b""), b""), {T.ELEMENT}),
    ByHand("every source allowed", "nft 'add element bridge meshnet sources4 { * }'",
           _set(T.ELEMENT, ElementKey("sources4", b""), b""), {T.ELEMENT}),
    ByHand("set flushed", "nft flush set inet meshnet members4", _flush_members, {T.ELEMENT}),
    ByHand("port published",
           "nft add element inet meshnet published4 { tcp . 80 : 10.42.0.2 . 80 }",
           _set(T.ELEMENT, ElementKey("published4", b"\6\0\0\0\0P\0\0"), b"\x0a\x2a\0\2\0P\0\0"),
           {T.ELEMENT}),
    ByHand("rule added", "nft add rule inet meshnet postrouting counter accept",
           _set(T.FIREWALL, "", Ruleset(UNKNOWN, {})), {T.FIREWALL}),
]  # fmt: skip
