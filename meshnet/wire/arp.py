"""ARP over Ethernet: asking whether an IPv4 address is free.

::

     0              6             12     14                  Ethernet
    +--------------+--------------+------+
    | destination  |    source    | 0806 |
    +--------------+--------------+------+------+------+------+
    |  hardware: 1 | IPv4: 0x0800 |  6   |  4   |  operation  |   14   RFC 826
    +--------------+------+-------+------+------+-------------+
    |  sender MAC         |  sender IP   |                         22
    +---------------------+--------------+
    |  target MAC         |  target IP   |                         32
    +---------------------+--------------+

A *probe* (RFC 5227 §1.1) is a request whose sender IP is 0.0.0.0, so that nobody's cache takes it
for a statement.

Pure: imports only struct.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipaddress import IPv4Address

    from meshnet.wire import Buffer

ETHERTYPE = 0x0806
SENDER_IP_AT, TARGET_IP_AT = 28, 38
"""Where the two addresses are in a frame, for a socket's filter."""

_ARP = struct.Struct("!6s6sHHHBBH6s4s6s4s")
_HARDWARE_ETHERNET, _PROTOCOL_IPV4, _REQUEST = 1, 0x0800, 1
_BROADCAST, _NO_MAC, _NO_IP = b"\xff" * 6, bytes(6), bytes(4)


def encode_probe(address: IPv4Address, mac: bytes) -> bytes:
    """A frame that asks whether anybody has `address` (RFC 5227 §2.1.1)."""
    fixed = (ETHERTYPE, _HARDWARE_ETHERNET, _PROTOCOL_IPV4, 6, 4, _REQUEST)
    return _ARP.pack(_BROADCAST, mac, *fixed, mac, _NO_IP, _NO_MAC, address.packed)


def find_conflict(frame: Buffer, address: IPv4Address, mac: bytes) -> bytes | None:
    """The MAC of whoever has, or is about to take, the address that `mac` probes for; or None.

    Any ARP packet whose sender says to have the address is one, and so is a probe for it by
    somebody else (RFC 5227 §2.1.1).
    """
    if len(frame) < _ARP.size:
        return None
    _, _, ethertype, hardware, protocol, *_, sender_mac, sender_ip, _, target_ip = _ARP.unpack_from(
        frame
    )
    if (ethertype, hardware, protocol) != (ETHERTYPE, _HARDWARE_ETHERNET, _PROTOCOL_IPV4):
        return None
    probes_too = sender_ip == _NO_IP and target_ip == address.packed
    if sender_mac == mac or not (sender_ip == address.packed or probes_too):
        return None
    return bytes(sender_mac)
