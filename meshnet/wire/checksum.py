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

_CHUNK_BYTES = 1536


def ones_sum(data: Buffer) -> int:
    """Sum of a buffer; an odd last byte is the upper half of a word (RFC 1071 §2)."""
    size = len(data)
    if size <= _CHUNK_BYTES:
        number = int.from_bytes(data, "big") % 0xFFFF
        return number * 0x100 % 0xFFFF if size & 1 else number
    # Numbers that fit the processor's first cache; one modulo for all, which costs more than them.
    total = sum(
        int.from_bytes(data[i : i + _CHUNK_BYTES], "big")
        for i in range(0, size - _CHUNK_BYTES, _CHUNK_BYTES)
    )
    return (total + ones_sum(data[size - 1 - (size - 1) % _CHUNK_BYTES :])) % 0xFFFF


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
