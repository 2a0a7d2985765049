"""Cutting: from a super-packet that the kernel hands to a TUN to datagrams for the underlay.

::

    TUN:  [virtio][ IP | TCP |   up to 64 KiB of payload            ]
                      │
    wire: [VXLAN|Eth|IP|TCP| payload 0 ][VXLAN|Eth|IP|TCP| payload 1 ] …  one UDP_SEGMENT sendmsg

Nothing of the payload is copied or, where the peer finishes checksums, even looked at.  The headers
of all segments are laid side by side in one block: the first one, repeated, and then each field
that differs is written as a *column* through a strided memoryview, so that the work in Python
hardly grows with the number of segments.

Pure: imports only struct.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from meshnet.wire import virtio
from meshnet.wire.checksum import finished, finished_udp, ones_sum, partial
from meshnet.wire.vxlan import ENCAPSULATION_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from meshnet.wire import Buffer

MAX_SEGMENTS = 64
"""``UDP_MAX_SEGMENTS`` of kernels before 6.9; later ones allow 128."""
MAX_SEND_BYTES = 65_507
"""The largest UDP payload over IPv4."""

FIN, PSH, ACK, ECE, CWR = 0x01, 0x08, 0x10, 0x40, 0x80
JOINABLE = ACK | ECE
"""Flags of a segment that another one may follow in a super-packet."""
MAX_PACKET_BYTES = 65_535
_IP = ENCAPSULATION_BYTES
_CACHED_LAYOUTS = 32
_HALF, _WORD = struct.Struct(">H"), struct.Struct(">I")
_V4_TAIL, _V4_LENGTH = struct.Struct(">HHHH"), struct.Struct(">HHHHH")
_BLOCK_BYTES = 16 * 1024

Send = tuple["list[Buffer]", int]
"""Buffers to send at once, and the bytes of one datagram of them; 0: they are one datagram."""


class HeaderRoom:
    """Room for the headers of one super-packet, side by side; made anew where it is too small.

    Attributes:
        block: the bytes.
        words: the same as 16-bit words in network byte order, whatever the machine's.
    """

    __slots__ = ("block", "words")

    def __init__(self, size: int = _BLOCK_BYTES) -> None:
        self.block = bytearray(size)
        self.words = memoryview(self.block).cast("H")

    def reserve(self, size: int) -> bool:
        """Make room; returns whether `block` is another one now."""
        if size <= len(self.block):
            return False
        self.block = bytearray(size + size % 2)
        self.words = memoryview(self.block).cast("H")
        return True

    def lay(
        self, template: Buffer, count: int, *, transport: int, step: int | None, same_id: bool
    ) -> None:
        """Repeat a header, with what differs between the segments of one super-packet.

        Args:
            template: encapsulation, IP and transport header of the first segment.
            count: segments; there must be room for them.
            transport: where the transport header starts in `template`.
            step: bytes of payload of a segment, by which TCP's sequence number grows; None: UDP.
            same_id: the IPv4 identification is that of the first for all.
        """
        size = len(template)
        width, end = size >> 1, count * size >> 1
        self.block[: count * size] = bytes(template) * count
        words = self.words
        if template[_IP] >> 4 == 4 and not same_id:
            ident, _, _, check = _V4_TAIL.unpack_from(template, _IP + 4)
            idents, checks = id_columns(ident, check, count)
            words[(_IP + 4) >> 1 : end : width] = idents
            words[(_IP + 10) >> 1 : end : width] = checks
        if step is not None:
            (first,) = _WORD.unpack_from(template, transport + 4)
            numbers = _run(first, count, step, 1 << 32)
            pairs = memoryview(struct.pack(f">{count}I", *numbers)).cast("H")
            at = (transport + 4) >> 1
            words[at:end:width] = pairs[0::2]
            words[at + 1 : end : width] = pairs[1::2]


def column(values: Iterable[int], count: int) -> memoryview:
    """Values as 16-bit words in network byte order, to be assigned to a column."""
    return memoryview(struct.pack(f">{count}H", *values)).cast("H")


_ascending: memoryview | None = None
_descending: memoryview | None = None


def id_columns(ident: int, check: int, count: int) -> tuple[memoryview, memoryview]:
    """Identifications from `ident` on, and the header checksums that go with them.

    The sum grows with the identification, so the checksum falls as it does.  Both are slices of
    tables of all numbers, made when they are first needed: packing them anew would be a tenth of
    the work on a super-packet.
    """
    global _ascending, _descending
    if _ascending is None or _descending is None:
        _ascending = column(range(0x1_0000), 0x1_0000)
        _descending = column((*range(0xFFFE, -1, -1), *range(0xFFFE, 0x7FFE, -1)), 0x1_7FFF)
    if ident + count <= 0x1_0000 and count <= 0x8000:
        at = 0xFFFE - check % 0xFFFF
        return _ascending[ident : ident + count], _descending[at : at + count]
    idents = [(ident + i) & 0xFFFF for i in range(count)]
    return column(idents, count), column([(check + ident - i) % 0xFFFF for i in idents], count)


def set_length(header: bytearray, at: int, length: int) -> None:
    """Set the IP header's length field, and IPv4's checksum by the difference (RFC 1624).

    Args:
        header: its checksum is right for the length that it says.
        at: where the encapsulation before it starts.
        length: bytes of the IP packet.
    """
    at += _IP
    if header[at] >> 4 == 4:
        before, ident, fragment, ttl, check = _V4_LENGTH.unpack_from(header, at + 2)
        check = (check + before - length) % 0xFFFF
        _V4_LENGTH.pack_into(header, at + 2, length, ident, fragment, ttl, check)
    else:
        _HALF.pack_into(header, at + 4, length - 40)


def address_sum(header: Buffer) -> int:
    """Sum of both addresses of a packet; `header` starts with the encapsulation."""
    if header[_IP] >> 4 == 4:
        return int.from_bytes(header[_IP + 12 : _IP + 20], "big") % 0xFFFF
    return int.from_bytes(header[_IP + 8 : _IP + 40], "big") % 0xFFFF


def complete(packet: memoryview, csum_start: int, csum_offset: int) -> None:
    """Finish the checksum of one packet in place (``VIRTIO_NET_HDR_F_NEEDS_CSUM``)."""
    # The field holds the pseudo-header's sum, so it is part of what is to be summed.
    total = ones_sum(packet[csum_start:])
    check = finished_udp(total) if csum_offset == 6 else finished(total)
    struct.pack_into(">H", packet, csum_start + csum_offset, check)


class Cutter:
    """Cuts super-packets that stand in one buffer, at offset `start`.

    What `cut` returns refers to the buffer and to this object's own: it is to be sent before either
    is used again.
    """

    def __init__(self, buffer: bytearray | memoryview, start: int) -> None:
        self._view = memoryview(buffer)
        self._start = start
        self._room = HeaderRoom()
        # By bytes of header and of payload: header and payload of each segment in turn.
        self._layouts: dict[tuple[int, int], list[Buffer]] = {}

    def cut(
        self, length: int, header: Sequence[int], prefix: bytes, *, remote: bool = False
    ) -> list[Send]:
        """Cut one super-packet.

        Args:
            length: bytes of the IP packet.
            header: the virtio header's six numbers; a GSO type of TCP or UDP_L4.
            prefix: the 22 bytes of encapsulation.
            remote: leave the checksums unfinished; `prefix` says so to the receiver.

        Raises:
            ValueError: it is not what the virtio header says.
        """
        _, gso_type, _, size, csum_start, _ = header
        view, start = self._view, self._start
        tcp = gso_type & ~virtio.GSO_ECN != virtio.GSO_UDP_L4
        head = csum_start + ((view[start + csum_start + 12] >> 4) * 4 if tcp else 8)
        payload = length - head
        cut_short = payload <= 0 or csum_start < 20 or head < csum_start + (20 if tcp else 8)
        if cut_short or size == 0 or (head | csum_start) & 1:
            raise ValueError(f"no super-packet: {length} bytes, virtio header {tuple(header)}")
        template = bytearray(prefix)
        template += view[start : start + head]
        count = -(-payload // size)
        buffers = self._layout(len(template), size, count)
        self._write(template, _IP + csum_start, count, size, payload, remote=remote, tcp=tcp)
        return self._sends(buffers, count, len(template) + size, payload - (count - 1) * size)

    def _layout(self, head: int, size: int, count: int) -> list[Buffer]:
        """Header and payload of each of at least `count` segments, in turn."""
        if self._room.reserve(count * head):
            self._layouts.clear()
        buffers = self._layouts.get((head, size))
        if buffers is None:
            if len(self._layouts) >= _CACHED_LAYOUTS:
                self._layouts.clear()
            buffers = self._layouts[head, size] = []
        block, view = memoryview(self._room.block), self._view
        first = self._start + head - _IP
        for i in range(len(buffers) // 2, count):
            buffers.append(block[i * head : (i + 1) * head])
            buffers.append(view[first + i * size : first + (i + 1) * size])
        return buffers

    def _sends(self, buffers: list[Buffer], count: int, segment: int, last: int) -> list[Send]:
        most = min(MAX_SEGMENTS, MAX_SEND_BYTES // segment)
        sends: list[Send] = []
        for at in range(0, count, most):
            end = min(count, at + most)
            part = buffers[2 * at : 2 * end]
            if end == count:
                part[-1] = part[-1][:last]
            sends.append((part, segment if end - at > 1 else 0))
        return sends

    def _write(
        self,
        template: bytearray,
        transport: int,
        count: int,
        size: int,
        payload: int,
        *,
        remote: bool,
        tcp: bool,
    ) -> None:
        """Write all headers into the block."""
        head, last = len(template), payload - (count - 1) * size
        header_bytes = head - _IP
        set_length(template, 0, header_bytes + size)
        check_at = transport + (16 if tcp else 6)
        # The field holds the pseudo-header's sum for the whole; only the length is another one.
        (field,) = _HALF.unpack_from(template, check_at)
        full, short = field - payload + size, field - payload + last
        flags = 0
        if tcp:
            flags = template[transport + 13]
            template[transport + 13] = flags & ~(FIN | PSH | CWR)
        else:
            _HALF.pack_into(template, transport + 4, 8 + size)
        _HALF.pack_into(template, check_at, partial(full) if remote else 0)
        room = self._room
        room.lay(template, count, transport=transport, step=size if tcp else None, same_id=False)
        block, at = room.block, (count - 1) * head
        if flags & (FIN | PSH | CWR):
            # Of the flags only these differ: CWR on the first, PSH and FIN on the last.
            block[transport + 13] |= flags & CWR
            block[at + transport + 13] |= flags & (FIN | PSH)
        if last != size:
            set_length(block, at, header_bytes + last)
            if not tcp:
                _HALF.pack_into(block, at + transport + 4, 8 + last)
            if remote:
                _HALF.pack_into(block, at + check_at, partial(short))
        if not remote:
            width, end = head >> 1, count * head >> 1
            checks = self._checks(head, transport, count, size, last, (full, short), tcp=tcp)
            room.words[check_at >> 1 : end : width] = column(checks, count)

    def _checks(
        self,
        head: int,
        transport: int,
        count: int,
        size: int,
        last: int,
        pseudo: tuple[int, int],
        *,
        tcp: bool,
    ) -> list[int]:
        """The finished checksum of each segment; the block has all else, and 0 for these."""
        payloads: list[Buffer] = self._layouts[head, size][1 : 2 * count : 2]
        payloads[-1] = payloads[-1][:last]
        read = int.from_bytes
        block = self._room.block
        first, final = (
            ones_sum(block[at + transport : at + head]) for at in (0, (count - 1) * head)
        )
        if size & 1 or count == 1:
            sums = [ones_sum(p) for p in payloads]
        else:
            sums = [read(p, "big") % 0xFFFF for p in payloads[:-1]]
            sums.append(ones_sum(payloads[-1]))
        if not tcp:
            base = pseudo[0] + first
            checks = [-(base + s) % 0xFFFF or 0xFFFF for s in sums]
            checks[-1] = finished_udp(pseudo[1] + final + sums[-1])
            return checks
        # From the second one on without the first one's CWR; sequence numbers as they stand in
        # the block, because they may wrap.
        second = first - (block[transport + 13] & CWR)
        base = pseudo[0] + second - int.from_bytes(block[transport + 4 : transport + 8], "big")
        seq = int.from_bytes(block[transport + 4 : transport + 8], "big")
        numbers = _run(seq, count, size, 1 << 32)
        checks = [-(base + n + s) % 0xFFFF for n, s in zip(numbers, sums, strict=True)]
        checks[0] = finished(pseudo[0] + first + sums[0])
        checks[-1] = finished(pseudo[1] + final + sums[-1])
        if count == 1:
            checks[0] = checks[-1]
        return checks


def _run(first: int, count: int, step: int, modulus: int) -> Iterable[int]:
    """`count` numbers, `step` apart, modulo `modulus`."""
    last = first + (count - 1) * step
    if last < modulus:
        return range(first, last + step, step)
    return [(first + i * step) % modulus for i in range(count)]
