"""The inner packet: where its headers are, and how far its checksum is.

::

    IPv4   ver/ihl tos  length | id  flags/offset | ttl proto check | source | destination | options
    IPv6   ver/class/flow      | length  next hop-limit | source (16) | destination (16)
    TCP    ports (4) | sequence | acknowledgement | offset flags window | check urgent | options
    UDP    ports (4) | length check

Over a veth a kernel VXLAN peer hands over what it would leave to a network card: packets whose
transport checksum is unfinished (the field holds the pseudo-header's sum), and TCP super-packets
far beyond the MTU, whose segment size is lost on the way.  `describe` tells both by looking.

Pure: imports only struct.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from meshnet.wire import virtio
from meshnet.wire.checksum import partial

if TYPE_CHECKING:
    from meshnet.wire import Buffer

TCP, UDP = 6, 17
_V4 = struct.Struct(">BxHxxHxBxxII")
_V6 = struct.Struct(">BxxxHBxQQQQ")
_FRAGMENT = 0x3FFF  # more fragments, and the offset (RFC 791 §3.1)


class Inner:
    """An IP packet, located.

    Attributes:
        version: 4 or 6.
        length: bytes of the packet by its own header; what follows in the frame is padding.
        source, destination: as numbers.
        protocol: TCP, UDP, or what else; 0 for a fragment, which is not looked into.
        transport: where the transport header starts.
    """

    __slots__ = ("destination", "length", "protocol", "source", "transport", "version")

    def __init__(self, data: Buffer, offset: int, available: int) -> None:
        """Locate; nothing after `available` bytes from `offset` is read.

        Raises:
            ValueError: it is not an IP packet, or is cut short.
        """
        if available < 20:
            raise ValueError("shorter than an IP header")
        first = data[offset]
        if first >> 4 == 4:
            _, self.length, fragment, self.protocol, self.source, self.destination = (
                _V4.unpack_from(data, offset)
            )
            self.version, self.transport = 4, (first & 0x0F) * 4
            if fragment & _FRAGMENT:
                self.protocol = 0
        elif first >> 4 == 6 and available >= 40:
            _, length, self.protocol, s1, s0, d1, d0 = _V6.unpack_from(data, offset)
            self.source, self.destination = s1 << 64 | s0, d1 << 64 | d0
            self.version, self.transport, self.length = 6, 40, length + 40
        else:
            raise ValueError(f"IP version {first >> 4}, {available} bytes")
        if not 20 <= self.transport <= self.length <= available:
            raise ValueError(f"{available} bytes, of which the IP header claims {self.length}")


def describe(
    inner: Inner, data: Buffer, offset: int, mtu_bytes: int, *, unfinished: bool = False
) -> bytes | None:
    """The virtio header to write a received packet with.

    Args:
        inner: the packet, which starts at `offset` in `data`.
        mtu_bytes: of the device: what is larger came from a veth, and is cut to this if it ever has
            to be.
        unfinished: the frame says by itself that the checksum is not finished (remote checksum).

    Returns:
        None: it is larger than the MTU and no TCP.  A UDP super-packet cannot be carried on,
        because nothing says where its datagrams end.
    """
    transport, length = inner.transport, inner.length
    room = length - transport
    if inner.protocol == TCP and room >= 20:
        at, head = 16, transport + (data[offset + transport + 12] >> 4) * 4
    elif inner.protocol == UDP and room >= 8:
        at, head = 6, transport + 8
    else:
        return virtio.PLAIN if length <= mtu_bytes else None
    field = offset + transport + at
    check = data[field] << 8 | data[field + 1]
    large = length > mtu_bytes
    if large and (at == 6 or not transport + 20 <= head < min(mtu_bytes, length)):
        return None
    if not unfinished and not large:
        pseudo = inner.source + inner.destination + inner.protocol + room
        if check != partial(pseudo):
            return virtio.PLAIN
    if not large:
        return virtio.pack(virtio.NEEDS_CSUM, 0, head, 0, transport, at)
    kind = virtio.GSO_TCPV4 if inner.version == 4 else virtio.GSO_TCPV6
    if data[offset + transport + 13] & 0x80:
        kind |= virtio.GSO_ECN
    return virtio.pack(virtio.NEEDS_CSUM, kind, head, mtu_bytes - head, transport, at)
