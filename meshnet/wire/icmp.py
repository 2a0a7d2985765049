"""ICMP and ICMPv6 answers to packets that cannot be carried on (RFC 792, RFC 1191, RFC 4443).

::

    +--------+--------+-----------------+
    |  type  |  code  |    checksum     |   v4 3/1 unreachable, 3/4 frag needed
    +--------+--------+-----------------+   v6 1/0 no route,    2/0 packet too big
    |       0, or the next hop's MTU    |
    +-----------------------------------+
    |  start of the packet in question  |

There is no "time exceeded": the hosts' kernels route into the TUN and out of it, and count the TTL
down there, just as around a kernel VXLAN device.  The data path never touches it.

The answer's source is the address that the packet was for.  One of the host's own would be
more usual, but Linux takes what comes in by a device with such a source for forged.

Pure: imports only struct.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from meshnet.wire.checksum import finished, ones_sum, pseudo_sum

if TYPE_CHECKING:
    from meshnet.wire import Buffer

ICMP, ICMPV6 = 1, 58
_QUOTE_BYTES = {4: 548, 6: 1232}
"""What fits the smallest MTU (RFC 1812 §4.3.2.3: 576; RFC 4443 §2.4 (c): 1280)."""
_ERRORS_V4 = frozenset({3, 4, 5, 11, 12})
_TTL = 64


def unreachable(packet: Buffer) -> bytes | None:
    """No host answers for the packet's destination."""
    version = packet[0] >> 4
    return _answer(packet, (3, 1) if version == 4 else (1, 0), 0)


def too_big(packet: Buffer, mtu_bytes: int) -> bytes | None:
    """The packet may not be fragmented and is larger than `mtu_bytes`."""
    version = packet[0] >> 4
    return _answer(packet, (3, 4) if version == 4 else (2, 0), mtu_bytes)


def _answer(packet: Buffer, kind: tuple[int, int], rest: int) -> bytes | None:
    """The answer, an IP packet; None where none may be given (RFC 1122 §3.2.2, RFC 4443 §2.4)."""
    if packet[0] >> 4 == 4:
        return _answer_v4(packet, kind, rest) if len(packet) >= 20 else None
    return _answer_v6(packet, kind, rest) if len(packet) >= 40 else None


def _answer_v4(packet: Buffer, kind: tuple[int, int], rest: int) -> bytes | None:
    head = (packet[0] & 0x0F) * 4
    source, destination = bytes(packet[12:16]), bytes(packet[16:20])
    if (packet[6] & 0x1F) or packet[7] or not _is_host(source[0]) or not _is_host(destination[0]):
        return None
    if packet[9] == ICMP and (len(packet) <= head or packet[head] in _ERRORS_V4):
        return None
    body = bytearray(struct.pack(">BBHI", *kind, 0, rest))
    body += packet[: _QUOTE_BYTES[4]]
    struct.pack_into(">H", body, 2, finished(ones_sum(body)))
    header = bytearray(
        struct.pack(">BBHHHBBH", 0x45, 0xC0, 20 + len(body), 0, 0x4000, _TTL, ICMP, 0)
    )
    header += destination + source
    struct.pack_into(">H", header, 10, finished(ones_sum(header)))
    return bytes(header + body)


def _is_host(first: int) -> bool:
    """Whether an IPv4 address with this first byte may be one host's."""
    return 0 < first < 224 and first != 127


def _answer_v6(packet: Buffer, kind: tuple[int, int], rest: int) -> bytes | None:
    source, destination = bytes(packet[8:24]), bytes(packet[24:40])
    if source[0] == 0xFF or not any(source) or destination[0] == 0xFF:
        return None
    if packet[6] == ICMPV6 and (len(packet) <= 40 or packet[40] < 128):
        return None
    body = bytearray(struct.pack(">BBHI", *kind, 0, rest))
    body += packet[: _QUOTE_BYTES[6]]
    addresses = int.from_bytes(destination + source, "big")
    pseudo = pseudo_sum(addresses, ICMPV6, len(body))
    struct.pack_into(">H", body, 2, finished(ones_sum(body) + pseudo))
    header = struct.pack(">IHBB", 0x6000_0000, len(body), ICMPV6, _TTL)
    return header + destination + source + bytes(body)
