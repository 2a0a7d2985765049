"""Joining a train: what ``UDP_GRO`` hands over becomes one super-packet for the TUN.

The rules, and why checksums are looked at first, are in `meshnet.wire.coalesce`.  Here all headers
are foretold from the first one, and compared at once.

Pure: imports only struct.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from meshnet.wire import virtio
from meshnet.wire.checksum import ones_sum, partial
from meshnet.wire.inner import TCP, UDP
from meshnet.wire.segment import (
    ACK,
    FIN,
    JOINABLE,
    MAX_PACKET_BYTES,
    PSH,
    HeaderRoom,
    address_sum,
    set_length,
)
from meshnet.wire.vxlan import ENCAPSULATION_BYTES

if TYPE_CHECKING:
    from meshnet.wire import Buffer

_IP = ENCAPSULATION_BYTES
_CACHED_LAYOUTS = 32
_FRONT = _IP - virtio.HEADER_BYTES
_HALF = struct.Struct(">H")


class TrainJoiner:
    """Joins what UDP_GRO hands over in one buffer, from its start on.

    What `join` returns refers to the buffer: it is to be written before the buffer is used again.
    """

    def __init__(self, buffer: bytearray | memoryview) -> None:
        self._view = memoryview(buffer)
        self._room = HeaderRoom()
        # By header and datagram size: views of the headers, and of the payloads.
        self._layouts: dict[tuple[int, int], tuple[list[memoryview], list[memoryview]]] = {}

    def join(
        self, size: int, total: int, *, unfinished: bool, udp: bool = True
    ) -> list[Buffer] | None:
        """Join all datagrams, which are as many segments of one flow.

        Args:
            size: bytes of a datagram; the last may be shorter.
            total: bytes of all.
            unfinished: the first one's encapsulation says that its checksum is not finished; all
                have the same encapsulation, or they are not joined.
            udp: whether UDP datagrams are to be joined.

        Returns:
            Buffers to write at once, starting with a virtio header; None: they are not to be
            joined as a whole.
        """
        if total <= size:
            return None
        view = self._view
        protocol, transport = self._locate(size)
        if protocol == TCP:
            head = transport + (view[transport + 12] >> 4) * 4
            check_at = transport + 16
        elif protocol == UDP and udp:
            head, check_at = transport + 8, transport + 6
        else:
            return None
        count = -(-total // size)
        payload = size - head
        last = total - (count - 1) * size - head
        merged = head - _IP + (count - 1) * payload + last
        if payload <= 0 or last <= 0 or merged > MAX_PACKET_BYTES or head & 1:
            return None
        heads, payloads = self._layout(head, size, count)
        actual = b"".join(heads)
        flags = self._foretell(actual, head, transport, count, payload, last, protocol)
        if flags is None or not self._room.block.startswith(actual):
            return None
        if not unfinished and not self._verify(
            actual, payloads, head, transport, check_at, size, total, count, protocol
        ):
            return None
        header = bytearray(actual[:head])
        set_length(header, 0, merged)
        if protocol == TCP:
            header[transport + 13] |= flags
            kind = virtio.GSO_TCPV4 if header[_IP] >> 4 == 4 else virtio.GSO_TCPV6
        else:
            _HALF.pack_into(header, transport + 4, merged - transport + _IP)
            kind = virtio.GSO_UDP_L4
        pseudo = address_sum(header) + protocol + merged - transport + _IP
        _HALF.pack_into(header, check_at, partial(pseudo))
        virtio.pack_into(
            header, _FRONT, virtio.NEEDS_CSUM, kind, head - _IP, payload, transport - _IP,
            check_at - transport,
        )  # fmt: skip
        buffers: list[Buffer] = [memoryview(header)[_FRONT:], *payloads]
        if last != payload:
            buffers[-1] = buffers[-1][:last]
        return buffers

    def _locate(self, size: int) -> tuple[int, int]:
        """Protocol of the first packet, 0 if it cannot be joined; where its transport starts."""
        view = self._view
        if size < _IP + 20:
            return 0, 0
        if view[_IP] >> 4 == 4:
            transport = _IP + (view[_IP] & 0x0F) * 4
            fragment = view[_IP + 6] & 0x3F or view[_IP + 7]
            protocol = 0 if fragment or transport < _IP + 20 else view[_IP + 9]
        elif size >= _IP + 40:
            transport, protocol = _IP + 40, view[_IP + 6]
        else:
            return 0, 0
        need = transport + (20 if protocol == TCP else 8)
        if size < need or (protocol == TCP and view[transport + 12] >> 4 < 5):
            return 0, 0
        return protocol, transport

    def _layout(
        self, head: int, size: int, count: int
    ) -> tuple[list[memoryview], list[memoryview]]:
        """Views of the first `count` headers and payloads."""
        self._room.reserve(count * head)
        layout = self._layouts.get((head, size))
        if layout is None:
            if len(self._layouts) >= _CACHED_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[head, size] = ([], [])
        heads, payloads = layout
        for i in range(len(heads), count):
            heads.append(self._view[i * size : i * size + head])
            payloads.append(self._view[i * size + head : (i + 1) * size])
        return heads[:count], payloads[:count]

    def _foretell(
        self,
        actual: bytes,
        head: int,
        transport: int,
        count: int,
        payload: int,
        last: int,
        protocol: int,
    ) -> int | None:
        """Write what the headers have to be, but for checksums, into the block.

        Returns:
            PSH and FIN, as far as the last one has them; None: the first one's flags forbid it.
        """
        tcp = protocol == TCP
        if tcp and (actual[transport + 13] & ~JOINABLE or not actual[transport + 13] & ACK):
            return None
        # Every header is to have the length of a full segment, the first one in the first place.
        header_bytes, same_id = head - _IP, False
        if actual[_IP] >> 4 == 4:
            same_id = bool(actual[_IP + 6] & 0x40) and (
                actual[_IP + 4 : _IP + 6] == actual[head + _IP + 4 : head + _IP + 6]
            )
            (length,) = _HALF.unpack_from(actual, _IP + 2)
            if length != header_bytes + payload or ones_sum(actual[_IP:transport]):
                return None
        elif _HALF.unpack_from(actual, _IP + 4)[0] != header_bytes - 40 + payload:
            return None
        if not tcp and _HALF.unpack_from(actual, transport + 4)[0] != 8 + payload:
            return None
        room, step = self._room, payload if tcp else None
        room.lay(actual[:head], count, transport=transport, step=step, same_id=same_id)
        block, at = room.block, (count - 1) * head
        flags = 0
        if last != payload:
            set_length(block, at, header_bytes + last)
            if not tcp:
                _HALF.pack_into(block, at + transport + 4, 8 + last)
        if tcp:
            flags = actual[at + transport + 13] & (PSH | FIN)
            block[at + transport + 13] |= flags
        column, end, width = (transport + (16 if tcp else 6)) >> 1, count * head >> 1, head >> 1
        room.words[column:end:width] = memoryview(actual).cast("H")[column::width]
        return flags

    def _verify(
        self,
        actual: bytes,
        payloads: list[memoryview],
        head: int,
        transport: int,
        check_at: int,
        size: int,
        total: int,
        count: int,
        protocol: int,
    ) -> bool:
        """Whether all checksums are right: one sum over everything."""
        if size & 1:
            return False  # words would not be aligned; the coalescer verifies one by one
        if protocol == UDP:
            checks = memoryview(actual).cast("H")[check_at >> 1 :: head >> 1]
            if 0 in checks.tolist():
                return False  # no checksum
        # What stands before the transport header is the same everywhere, save the IP header's
        # length, identification and checksum: of IPv4 the whole header sums to 0.
        other = count * ones_sum(actual[:_IP])
        first, final = actual[:head], actual[(count - 1) * head :]
        if actual[_IP] >> 4 == 6:
            other += (count - 1) * ones_sum(first[_IP:transport]) + ones_sum(final[_IP:transport])
        pseudo = count * (address_sum(actual) + protocol) + total - count * transport
        read = int.from_bytes
        data = sum([read(part, "big") for part in payloads[:-1]])
        last = total - (count - 1) * size - head
        data += ones_sum(payloads[-1][:last])
        return (ones_sum(actual) - other + pseudo + data) % 0xFFFF == 0


def extend(first: list[Buffer], second: list[Buffer]) -> bool:
    """Join two super-packets of `TrainJoiner.join`, if the second goes on where the first ends.

    A sender's 64 KiB are a little more than one ``UDP_SEGMENT`` send may be, so they come as two.

    Args:
        first: changed to be both, where that is what they are.
    """
    ours, other = first[0], second[0]
    front = virtio.unpack_from(ours, 0)
    _, kind, head, size, transport, _ = front
    if kind not in (virtio.GSO_TCPV4, virtio.GSO_TCPV6) or len(ours) != len(other):
        return False
    ip, tcp = virtio.HEADER_BYTES, virtio.HEADER_BYTES + transport
    length_at = ip + (2 if kind == virtio.GSO_TCPV4 else 4)
    length, more = (
        _HALF.unpack_from(data, length_at)[0] + (0 if kind == virtio.GSO_TCPV4 else 40)
        for data in (ours, other)
    )
    mine, added = length - head, more - head
    seq, next_seq = (int.from_bytes(data[tcp + 4 : tcp + 8], "big") for data in (ours, other))
    if mine % size or length + added > MAX_PACKET_BYTES or ours[tcp + 13] & (PSH | FIN):
        return False
    if next_seq != seq + mine & 0xFFFF_FFFF:
        return False
    # All else is the same: put the first one's values where they may differ, and compare.
    same = bytearray(other)
    places = [(length_at, 2), (tcp + 4, 4), (tcp + 16, 2)]
    if kind == virtio.GSO_TCPV4:
        ident, next_ident = (_HALF.unpack_from(data, ip + 4)[0] for data in (ours, other))
        counts_up = next_ident == ident + mine // size & 0xFFFF
        if not counts_up and not (ours[ip + 6] & 0x40 and next_ident == ident):
            return False
        places += [(ip + 4, 2), (ip + 10, 2)]
    for at, width in places:
        same[at : at + width] = ours[at : at + width]
    flags = same[tcp + 13] & (PSH | FIN)
    same[tcp + 13] &= ~flags
    if same != ours:
        return False
    set_length(same, ip - _IP, length + added)
    same[tcp + 13] |= flags
    (field,) = _HALF.unpack_from(same, tcp + 16)
    _HALF.pack_into(same, tcp + 16, partial(field + added))
    first[0] = same
    first += second[1:]
    return True
