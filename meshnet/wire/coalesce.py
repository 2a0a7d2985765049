"""Joining: neighbouring segments of one flow become one super-packet for the TUN.

Two ways, with the same rules:

- `meshnet.wire.train` takes what ``UDP_GRO`` hands over, datagrams of one size side by side, which
  is most often one super-packet that the sender cut.  It foretells what all headers would be then,
  and compares once.
- The `Coalescer` here takes packet by packet what the first refuses: after a loss, from senders
  without ``UDP_SEGMENT``, of several flows mixed.

Segments are joined if each continues the last without a gap and they agree in everything but
IPv4 identification (which must count up, or stay under DF), length, sequence number and checksum:
addresses, ports, TTL, TOS, DF, flow label, acknowledgement, window, flags, options.  Only ACK and
ECE may be set; PSH or FIN may be on the last, and ends the run, as a shorter segment does.  UDP
datagrams are joined by the train joiner only (the kernel cuts them again where a program has not
asked for them so).

**A checksum is looked at before a segment is joined**, because the super-packet's own is said to be
unfinished, and so nobody would look after that.  In a train all are verified by one sum: the sum of
valid segments is valid, and one that is not spoils it (with the same certainty as a checksum has,
1 in 65,535).  What fails goes on as it came, for its receiver to refuse.

Pure: imports only struct.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from meshnet.wire import virtio
from meshnet.wire.checksum import ones_sum, partial, pseudo_sum
from meshnet.wire.inner import TCP
from meshnet.wire.segment import ACK, FIN, JOINABLE, MAX_PACKET_BYTES, PSH, address_sum, set_length
from meshnet.wire.vxlan import ENCAPSULATION_BYTES

if TYPE_CHECKING:
    from meshnet.wire import Buffer
    from meshnet.wire.inner import Inner

_IP = ENCAPSULATION_BYTES


class _Run:
    """Segments of a flow that may grow by another."""

    __slots__ = ("buffers", "first", "flags", "head", "ident", "last_ident", "length", "next_seq",
                 "same", "size", "version")  # fmt: skip

    def __init__(self, packet: bytes, inner: Inner, head: int, same: bytes) -> None:
        self.buffers: list[Buffer] = [packet]
        self.first, self.head, self.same, self.version = packet, head, same, inner.version
        self.flags = 0
        self.size = inner.length - head
        self.length = inner.length
        self.next_seq = _sequence(packet, inner.transport) + self.size & 0xFFFF_FFFF
        self.ident = self.last_ident = packet[4] << 8 | packet[5]


class Coalescer:
    """Joins TCP segments that come one by one; owns what it was given until it is flushed.

    The order within a flow is kept; that between flows may change, as far as one flush goes.
    """

    def __init__(self) -> None:
        self._runs: dict[bytes, _Run] = {}

    def push(self, packet: bytes, inner: Inner, *, unfinished: bool) -> list[list[Buffer]] | None:
        """Take a packet.

        Args:
            packet: an IP packet, without anything before or after.
            inner: where its headers are.
            unfinished: its checksum is not finished, and that is all right.

        Returns:
            What is to be written now, each starting with a virtio header; None: it is not a
            segment to be joined, and `flush_flow` has to come before it.
        """
        shape = _shape(packet, inner)
        if shape is None:
            return None
        key, same, head, flags = shape
        if not unfinished and not _valid(packet, inner):
            return None
        run = self._runs.get(key)
        if run is not None and _continues(run, packet, inner, same):
            run.buffers.append(memoryview(packet)[head:])
            run.length += inner.length - head
            run.next_seq = run.next_seq + inner.length - head & 0xFFFF_FFFF
            run.last_ident = packet[4] << 8 | packet[5]
            ready = []
        else:
            ready = self.flush_flow(packet, inner)
            run = self._runs[key] = _Run(packet, inner, head, same)
        run.flags |= flags & (PSH | FIN)
        if run.flags or inner.length - head < run.size:
            ready += self.flush_flow(packet, inner)
        return ready

    def flush_flow(self, packet: bytes, inner: Inner) -> list[list[Buffer]]:
        """What is held of the flow that a packet belongs to."""
        run = self._runs.pop(_key(packet, inner), None) if self._runs else None
        return [] if run is None else [_super_packet(run)]

    def flush(self) -> list[list[Buffer]]:
        """Everything held."""
        runs = list(self._runs.values())
        self._runs.clear()
        return [_super_packet(run) for run in runs]


def _key(packet: bytes, inner: Inner) -> bytes:
    """Addresses and ports."""
    start = 12 if inner.version == 4 else 8
    transport = inner.transport
    return (
        packet[start : transport if inner.version == 6 else 20] + packet[transport : transport + 4]
    )


def _sequence(packet: bytes, transport: int) -> int:
    return int.from_bytes(packet[transport + 4 : transport + 8], "big")


def _shape(packet: bytes, inner: Inner) -> tuple[bytes, bytes, int, int] | None:
    """Flow, what has to be the same, where the payload starts, flags; None: not to be joined."""
    transport = inner.transport
    if inner.protocol != TCP or inner.length < transport + 20:
        return None
    head = transport + (packet[transport + 12] >> 4) * 4
    flags = packet[transport + 13]
    if not transport + 20 <= head < inner.length or flags & ~(JOINABLE | PSH | FIN):
        return None
    if not flags & ACK:
        return None
    # tcp: acknowledgement and offset; flags; window; urgent pointer and options.
    same = packet[transport + 8 : transport + 13] + bytes((flags & JOINABLE,))
    same += packet[transport + 14 : transport + 16] + packet[transport + 18 : head]
    if inner.version == 4:
        same += packet[0:2] + packet[6:10] + packet[20:transport]
    else:
        same += packet[0:4] + packet[7:8]
    return _key(packet, inner), same, head, flags


def _valid(packet: bytes, inner: Inner) -> bool:
    transport = inner.transport
    pseudo = inner.source + inner.destination + TCP + inner.length - transport
    if inner.version == 4 and ones_sum(packet[:transport]):
        return False
    total: int = ones_sum(packet[transport:]) + pseudo
    return total % 0xFFFF == 0


def _continues(run: _Run, packet: bytes, inner: Inner, same: bytes) -> bool:
    if same != run.same or _sequence(packet, inner.transport) != run.next_seq:
        return False
    size = inner.length - run.head
    if size > run.size or run.length + size > MAX_PACKET_BYTES:
        return False
    if run.version == 4:
        ident = packet[4] << 8 | packet[5]
        counts_up = ident == (run.last_ident + 1) & 0xFFFF
        return counts_up or bool(packet[6] & 0x40 and ident == run.ident == run.last_ident)
    return True


def _super_packet(run: _Run) -> list[Buffer]:
    transport = (run.first[0] & 0x0F) * 4 if run.version == 4 else 40
    if len(run.buffers) == 1:
        # Alone it goes on as it came; its checksum is right or said to be unfinished.
        pseudo = pseudo_sum(
            address_sum(bytes(_IP) + run.first[:40]), TCP, len(run.first) - transport
        )
        check = run.first[transport + 16] << 8 | run.first[transport + 17]
        if check != partial(pseudo):
            return [virtio.PLAIN, run.first]
        return [virtio.pack(virtio.NEEDS_CSUM, 0, run.head, 0, transport, 16), run.first]
    header = bytearray(_IP) + run.first[: run.head]
    set_length(header, 0, run.length)
    header[_IP + transport + 13] |= run.flags
    pseudo = pseudo_sum(address_sum(header), TCP, run.length - transport)
    struct.pack_into(">H", header, _IP + transport + 16, partial(pseudo))
    kind = virtio.GSO_TCPV4 if run.version == 4 else virtio.GSO_TCPV6
    front = virtio.pack(virtio.NEEDS_CSUM, kind, run.head, run.size, transport, 16)
    return [front, header[_IP:], memoryview(run.first)[run.head :], *run.buffers[1:]]
