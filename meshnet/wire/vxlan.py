"""VXLAN's header and the inner Ethernet header.

::

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    |R|R|R|R|I|R|R|R|R R C R R R R R|            Reserved           |
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    |                VXLAN Network Identifier       |U|   Start     |
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    |                 inner destination MAC                         |
    +                               +-------------------------------+
    |                               |       inner source MAC        |
    +-------------------------------+                               +
    |                                                               |
    +-------------------------------+-------------------------------+
    |           EtherType           |  inner IP packet …

RFC 7348 §5: I is 1, all R and the last byte are 0.  C, U and Start are *remote checksum offload*
(draft-herbert-vxlan-rco, Linux' ``remcsumtx``/``remcsumrx``): with C the checksum of the inner
transport header, which starts at byte 2 × Start of the inner frame, is unfinished; U: it is
UDP's, else TCP's.  The outer UDP checksum, which then must be there, covers the inner packet.

Pure: imports only struct.
"""

from __future__ import annotations

import struct

VXLAN_BYTES = 8
ETHERNET_BYTES = 14
ENCAPSULATION_BYTES = VXLAN_BYTES + ETHERNET_BYTES
"""What stands before the inner IP packet in a datagram."""

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_IPV6 = 0x86DD

FLAG_VNI = 0x0800_0000
FLAG_REMOTE_CHECKSUM = 0x0020_0000
REMOTE_CHECKSUM_UDP = 0x80
_START_MASK = 0x7F
_HEADERS = struct.Struct(">II6s6sH")


def pack(
    vni: int, destination: bytes, source: bytes, ethertype: int, remote: tuple[int, bool] | None
) -> bytes:
    """The 22 bytes before the inner IP packet.

    Args:
        vni: 24 bits.
        destination: MAC of the VTEP that is to receive it.
        source: MAC of the one that sends it.
        remote: for remote checksum offload, where the transport header starts in the IP packet
            (even, at most 240), and whether it is UDP's.
    """
    flags, last = FLAG_VNI, 0
    if remote is not None:
        start, udp = remote
        flags |= FLAG_REMOTE_CHECKSUM
        last = (start + ETHERNET_BYTES) >> 1 | (REMOTE_CHECKSUM_UDP if udp else 0)
    return _HEADERS.pack(flags, vni << 8 | last, destination, source, ethertype)


class Encapsulation:
    """The 22 bytes, parsed.

    Attributes:
        flags: the first word.
        remote_start: where the transport header with the unfinished checksum starts in the inner IP
            packet; None: no remote checksum offload.
        remote_udp: whether that is a UDP header.
    """

    __slots__ = ("destination", "ethertype", "flags", "remote_start", "remote_udp", "source", "vni")

    def __init__(self, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Parse; the caller has made sure that there are 22 bytes."""
        self.flags, word, self.destination, self.source, self.ethertype = _HEADERS.unpack_from(
            data, offset
        )
        self.vni: int = word >> 8
        self.remote_udp = bool(word & REMOTE_CHECKSUM_UDP)
        self.remote_start: int | None = None
        if self.flags & FLAG_REMOTE_CHECKSUM:
            self.remote_start = ((word & _START_MASK) << 1) - ETHERNET_BYTES

    @property
    def valid(self) -> bool:
        """Whether it is a header of RFC 7348 or one with remote checksum offload."""
        return bool(self.flags & FLAG_VNI) and not self.flags & ~(FLAG_VNI | FLAG_REMOTE_CHECKSUM)
