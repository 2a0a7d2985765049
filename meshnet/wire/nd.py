"""IPv6 neighbour discovery over Ethernet: asking whether an address is free, saying who has it.

::

     0             14                          54                Ethernet, IPv6 (RFC 8200)
    +-------------+---------------------------+
    |  ... 86dd   |  ... 58 (ICMPv6), hop 255 |
    +------+------+-------+-------------------+
    | type | code |  sum  |  flags            |  54  RFC 4861 §4.3, §4.4
    +------+------+-------+-------------------+
    |  target address, 16 bytes               |  62
    +--------+--------+-----------------------+
    | type 2 | len 1  |  MAC                  |  78  of an advertisement
    +--------+--------+-----------------------+

Duplicate address detection (RFC 4862 §5.4.2) is a neighbour solicitation from ``::`` to the
address's solicited-node group.  Whoever has it answers with an advertisement to all nodes.

Pure: imports only struct.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from meshnet.wire.checksum import finished, ones_sum, pseudo_sum
from meshnet.wire.icmp import ICMPV6

if TYPE_CHECKING:
    from ipaddress import IPv6Address

    from meshnet.wire import Buffer

ETHERTYPE = 0x86DD
NEXT_HEADER_AT, TARGET_AT = 20, 62
"""Where these are in a frame, for a socket's filter."""
SOLICITATION, ADVERTISEMENT = 135, 136

_ETHERNET = struct.Struct("!6s6sH")
_IPV6 = struct.Struct("!IHBB16s16s")
_MESSAGE = struct.Struct("!BBHI16s")
_TYPE_AT = 54
HOP_LIMIT = 255
"""A router would have made it less: the sender is on the link (RFC 4861 §7.1)."""
_OVERRIDE = 1 << 29
_TARGET_LINK_LAYER_ADDRESS = 2
_UNSPECIFIED = bytes(16)
ALL_NODES = b"\xff\x02" + bytes(13) + b"\x01"
"""The group of all nodes of a link (RFC 4291 §2.7.1), packed."""


def solicited_node(address: IPv6Address) -> bytes:
    """The multicast group that whoever has `address` listens to (RFC 4291 §2.7.1), packed."""
    return b"\xff\x02" + bytes(9) + b"\x01\xff" + address.packed[13:]


def group_mac(group: bytes) -> bytes:
    """The Ethernet address of an IPv6 multicast group (RFC 2464 §7)."""
    return b"\x33\x33" + group[12:]


def encode_probe(address: IPv6Address, mac: bytes) -> bytes:
    """A frame that asks whether anybody has `address` (RFC 4862 §5.4.2)."""
    group = solicited_node(address)
    message = bytearray(_MESSAGE.pack(SOLICITATION, 0, 0, 0, address.packed))
    total = ones_sum(message) + _pseudo(_UNSPECIFIED, group, len(message))
    struct.pack_into("!H", message, 2, finished(total))
    header = _IPV6.pack(0x6000_0000, len(message), ICMPV6, HOP_LIMIT, _UNSPECIFIED, group)
    return _ETHERNET.pack(group_mac(group), mac, ETHERTYPE) + header + message


def encode_announcement(address: IPv6Address, mac: bytes) -> bytes:
    """An unsolicited advertisement, to all nodes: `mac` has `address` (RFC 4861 §7.2.6).

    The ICMPv6 message alone, whose checksum whoever sends it fills in.
    """
    message = _MESSAGE.pack(ADVERTISEMENT, 0, 0, _OVERRIDE, address.packed)
    return message + bytes((_TARGET_LINK_LAYER_ADDRESS, 1)) + mac


def find_conflict(frame: Buffer, address: IPv6Address, mac: bytes) -> bytes | None:
    """The MAC of whoever has, or is about to take, the address that `mac` probes for; or None.

    An advertisement of it is one, and so is somebody else's duplicate address detection for it
    (RFC 4862 §5.4.3, §5.4.4).  Packets that came through a router, or are damaged, are not.
    """
    if len(frame) < _TYPE_AT + _MESSAGE.size:
        return None
    _, source_mac, ethertype = _ETHERNET.unpack_from(frame)
    _, size, next_header, hop_limit, source, destination = _IPV6.unpack_from(frame, 14)
    kind, code, _, _, target = _MESSAGE.unpack_from(frame, _TYPE_AT)
    message = frame[_TYPE_AT : _TYPE_AT + size]
    if (
        (ethertype, next_header, hop_limit, code) != (ETHERTYPE, ICMPV6, HOP_LIMIT, 0)
        or target != address.packed
        or source_mac == mac
        or len(message) != size
        or (ones_sum(message) + _pseudo(source, destination, size)) % 0xFFFF
    ):
        return None
    probes_too = kind == SOLICITATION and source == _UNSPECIFIED
    return bytes(source_mac) if kind == ADVERTISEMENT or probes_too else None


def _pseudo(source: bytes, destination: bytes, size: int) -> int:
    return pseudo_sum(int.from_bytes(source + destination, "big"), ICMPV6, size)
