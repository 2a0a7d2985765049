"""Probes of the way between two VTEPs.

::

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    |    version    |     kind      |               0               |
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    |                            id, 64 bits                        |
    |                                                               |
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    |              when it was sent, ns of the sender's clock       |
    |                                                               |
    +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
    |  zeros, to the size that is asked for …

The payload of an Ethernet frame of type 0x88B5, which IEEE 802 leaves to local experiments; the
frame is in VXLAN's encapsulation, by whichever device.  An answer has the request's id and time,
and is as short as a frame may be: a long request that is answered says that long packets arrive.

Pure: imports only struct.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

ETHERTYPE = 0x88B5
SHORTEST_BYTES = 46
"""The least payload of an Ethernet frame."""
REQUEST, ANSWER = 1, 2
_VERSION = 1
_HEADER = struct.Struct(">BBHQQ")


class Probe(NamedTuple):
    """A probe's header.

    Attributes:
        kind: `REQUEST` or `ANSWER`.
        sent_ns: when the request was sent, by the clock of who sent it.
    """

    kind: int
    id: int
    sent_ns: int


def pack(probe: Probe, size_bytes: int = SHORTEST_BYTES) -> bytes:
    """A frame's payload of that size, or of the least."""
    return _HEADER.pack(_VERSION, probe.kind, 0, probe.id, probe.sent_ns).ljust(
        max(size_bytes, SHORTEST_BYTES), b"\0"
    )


def parse(payload: bytes | memoryview) -> Probe | None:
    """The header; None: it is not a probe of this version."""
    if len(payload) < SHORTEST_BYTES:
        return None
    version, kind, _, number, sent_ns = _HEADER.unpack_from(payload)
    if version != _VERSION or kind not in (REQUEST, ANSWER):
        return None
    return Probe(kind, number, sent_ns)
