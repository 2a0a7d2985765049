"""The virtio-net header that Linux' TUN puts before each packet (``IFF_VNET_HDR``).

::

    byte  0        1          2         4          6            8             10
          +--------+----------+---------+----------+------------+-------------+---------
          | flags  | gso_type | hdr_len | gso_size | csum_start | csum_offset | packet …
          +--------+----------+---------+----------+------------+-------------+---------

Multi-byte fields are in the machine's byte order (``tun_is_little_endian`` in tun.c).  Positions
count from the packet's first byte.  linux/virtio_net.h, ``struct virtio_net_hdr``.

Pure: imports only struct.
"""

from __future__ import annotations

import struct

HEADER_BYTES = 10

NEEDS_CSUM = 1
"""The checksum from csum_start on is to be finished; its field holds the pseudo-header's sum."""

GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_UDP_L4 = 5
GSO_ECN = 0x80
"""Added to a TCP type: CWR is set, and belongs on the first segment only."""

_HEADER = struct.Struct("=BBHHHH")
pack = _HEADER.pack
"""pack(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset) → 10 bytes."""
pack_into = _HEADER.pack_into
"""pack_into(buffer, offset, …) → the same, in place."""
unpack_from = _HEADER.unpack_from
"""unpack_from(buffer, offset) → the same six numbers."""
PLAIN = bytes(HEADER_BYTES)
"""The header of one packet with a finished checksum."""
