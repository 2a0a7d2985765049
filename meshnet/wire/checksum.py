"""The Internet checksum (RFC 1071), as arithmetic modulo 65,535.

A ones'-complement sum of 16-bit words is the buffer, read as one big number, modulo 0xffff: 2^16 is
1 modulo 0xffff, so every word counts once, wherever it stands.  So a sum can be put together from
sums of parts, and fields of any width can be added as they are (a 32-bit sequence number, a
128-bit address).  "Sum" below is such a residue, 0 to 65,534; 0 stands for both of the ones'
complement's zeros.

Pure: imports no I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshnet.wire import Buffer

_FOLD_BYTES = 4096


def ones_sum(data: Buffer) -> int:
    """Sum of a buffer; an odd last byte is the upper half of a word (RFC 1071 §2)."""
    size = len(data)
    number = int.from_bytes(data, "big")
    if size > _FOLD_BYTES:
        # Python's modulo costs twice as much a byte as reading the number; adding halves does not.
        bits = size * 8
        while bits > 8 * 1024:
            half = (bits // 2 + 31) & ~15
            number = (number >> half) + (number & ((1 << half) - 1))
            bits = half + 1
    number %= 0xFFFF
    return number * 0x100 % 0xFFFF if size & 1 else number


def finished(total: int) -> int:
    """The checksum field that makes words of that sum valid, as TCP, ICMP and IPv4 write it."""
    return -total % 0xFFFF


def finished_udp(total: int) -> int:
    """The same for UDP, where a field of 0 would say that there is no checksum (RFC 768)."""
    return -total % 0xFFFF or 0xFFFF


def partial(pseudo: int) -> int:
    """The field of an unfinished checksum: the pseudo-header's folded sum.

    This is what Linux leaves in packets whose checksum a device is to finish
    (``CHECKSUM_PARTIAL``, ``VIRTIO_NET_HDR_F_NEEDS_CSUM``).
    """
    return pseudo % 0xFFFF or 0xFFFF


def pseudo_sum(addresses: int, protocol: int, length: int) -> int:
    """Sum of a pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1).

    Args:
        addresses: sum of source and destination, or the two (or both as one) as plain numbers.
        protocol: 6, 17, 58; IPv6 and IPv4 give the same sum.
        length: bytes of the transport header and its payload.
    """
    return (addresses + protocol + length) % 0xFFFF
