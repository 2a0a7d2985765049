"""ARP and neighbour discovery packets, checked by scapy, and what counts as a conflict."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    IPv6,
    in6_chksum,
)
from scapy.layers.l2 import ARP, Ether

from meshnet.wire import arp, nd

if TYPE_CHECKING:
    from types import ModuleType

    from meshnet.model import IpAddress

macs = st.binary(min_size=6, max_size=6)
addresses4 = st.integers(1, (1 << 32) - 1).map(IPv4Address)
addresses6 = st.integers(1, (1 << 128) - 1).map(IPv6Address)
MINE, THEIRS = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
A4, A6 = IPv4Address("192.0.2.7"), IPv6Address("2001:db8::7:8:9")
OTHER4, OTHER6 = IPv4Address("192.0.2.9"), IPv6Address("2001:db8::9")


@given(addresses4, macs)
def test_arp_probes(address: IPv4Address, mac: bytes) -> None:
    frame = arp.encode_probe(address, mac)
    found = Ether(frame)
    assert (found.dst, found.src) == ("ff:ff:ff:ff:ff:ff", mac.hex(":"))
    assert (found[ARP].op, found[ARP].hwsrc, found[ARP].psrc) == (1, mac.hex(":"), "0.0.0.0")
    assert (found[ARP].hwdst, found[ARP].pdst) == ("00:00:00:00:00:00", str(address))
    assert len(frame) == 42


@given(addresses6, macs)
def test_duplicate_address_detection(address: IPv6Address, mac: bytes) -> None:
    found = Ether(nd.encode_probe(address, mac))
    group = IPv6Address(nd.solicited_node(address))
    assert (found[IPv6].src, found[IPv6].hlim) == ("::", 255)
    assert IPv6Address(found[IPv6].dst) == group
    assert found.dst == "33:33:" + group.packed[12:].hex(":")
    assert IPv6Address(found[ICMPv6ND_NS].tgt) == address
    assert checksum_is_right(found)


@given(addresses6, macs)
def test_unsolicited_advertisements(address: IPv6Address, mac: bytes) -> None:
    advertised = ICMPv6ND_NA(nd.encode_announcement(address, mac))
    assert (advertised.type, advertised.R, advertised.S, advertised.O) == (136, 0, 0, 1)
    assert IPv6Address(advertised.tgt) == address
    assert advertised[ICMPv6NDOptDstLLAddr].lladdr == mac.hex(":")


def checksum_is_right(frame: Ether) -> bool:
    return bool(in6_chksum(58, frame[IPv6], bytes(frame[IPv6].payload)) == 0)  # type: ignore[no-untyped-call]


def arp_frame(sender: str, target: str, *, op: int = 1, mac: bytes = THEIRS) -> bytes:
    packet = ARP(op=op, hwsrc=mac.hex(":"), psrc=sender, pdst=target)
    return bytes(Ether(src=mac.hex(":"), dst="ff:ff:ff:ff:ff:ff") / packet)


@pytest.mark.parametrize(
    ("frame", "conflicts"),
    [
        (arp_frame(str(A4), str(OTHER4)), True),
        (arp_frame(str(A4), "0.0.0.0", op=2), True),
        (arp_frame(str(A4), str(A4)), True),
        (arp.encode_probe(A4, THEIRS), True),
        (arp.encode_probe(A4, MINE), False),
        (arp_frame(str(OTHER4), str(A4)), False),
        (arp.encode_probe(OTHER4, THEIRS), False),
        (arp_frame(str(A4), str(OTHER4))[:41], False),
        (arp_frame(str(A4), str(OTHER4)).replace(b"\x08\x06", b"\x08\x00"), False),
        (b"", False),
    ],
)
def test_what_conflicts_with_an_arp_probe(frame: bytes, conflicts: bool) -> None:
    assert arp.find_conflict(frame, A4, MINE) == (THEIRS if conflicts else None)


def advertisement(target: IPv6Address, *, hop_limit: int = 255, mac: bytes = THEIRS) -> bytes:
    header = IPv6(src=str(target), dst="ff02::1", hlim=hop_limit)
    message = ICMPv6ND_NA(tgt=str(target)) / ICMPv6NDOptDstLLAddr(lladdr=mac.hex(":"))
    return bytes(Ether(src=mac.hex(":"), dst="33:33:00:00:00:01") / header / message)


def resolution(target: IPv6Address) -> bytes:
    """A request from somebody who looks for the address, and so does not have it."""
    header = IPv6(src="fe80::1", dst=str(IPv6Address(nd.solicited_node(target))), hlim=255)
    return bytes(Ether(src=THEIRS.hex(":")) / header / ICMPv6ND_NS(tgt=str(target)))


@pytest.mark.parametrize(
    ("frame", "conflicts"),
    [
        (advertisement(A6), True),
        (nd.encode_probe(A6, THEIRS), True),
        (nd.encode_probe(A6, MINE), False),
        (advertisement(OTHER6), False),
        (advertisement(A6, hop_limit=254), False),
        (resolution(A6), False),
        (advertisement(A6)[:-1], False),
        (advertisement(A6)[:-1] + b"\0", False),
        (b"", False),
    ],
)
def test_what_conflicts_with_duplicate_address_detection(frame: bytes, conflicts: bool) -> None:
    assert nd.find_conflict(frame, A6, MINE) == (THEIRS if conflicts else None)


@pytest.mark.parametrize(("wire", "address"), [(arp, A4), (nd, A6)])
@given(frame=st.binary(max_size=120))
def test_any_bytes_are_looked_at(wire: ModuleType, address: IpAddress, frame: bytes) -> None:
    assert wire.find_conflict(frame, address, MINE) is None
