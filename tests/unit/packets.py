"""Packets for tests of the userspace VTEP's wire code: made by hand, looked at by scapy."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from meshnet.wire import virtio, vxlan
from meshnet.wire.checksum import finished, ones_sum, partial, pseudo_sum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.wire import Buffer

MACS = (bytes.fromhex("026d0a2a0200"), bytes.fromhex("026d0a2a0100"))
VNI = 4097
_V6 = "fd00004200000001" + "0" * 15 + "2", "fd00004200000002" + "0" * 15 + "3"
ADDRESSES = {
    4: (bytes((10, 42, 1, 2)), bytes((10, 42, 2, 3))),
    6: (bytes.fromhex(_V6[0]), bytes.fromhex(_V6[1])),
}


def prefix(version: int, remote: tuple[int, bool] | None = None) -> bytes:
    """Encapsulation from host 1 to host 2."""
    kind = vxlan.ETHERTYPE_IPV4 if version == 4 else vxlan.ETHERTYPE_IPV6
    return vxlan.pack(VNI, MACS[0], MACS[1], kind, remote)


def ip_packet(
    version: int, protocol: int, transport: bytes, *, ident: int = 7, df: int = True, tos: int = 0
) -> bytes:
    """An IP packet, with its header's checksum."""
    source, destination = ADDRESSES[version]
    if version == 6:
        head = struct.pack(">IHBB", 6 << 28 | tos << 20, len(transport), protocol, 63)
        return head + source + destination + transport
    header = bytearray(
        struct.pack(
            ">BBHHHBBH", 0x45, tos, 20 + len(transport), ident, 0x4000 if df else 0, 63, protocol, 0
        )
    )
    header += source + destination
    struct.pack_into(">H", header, 10, finished(ones_sum(header)))
    return bytes(header) + transport


def pseudo(version: int, protocol: int, length: int) -> int:
    """Sum of the pseudo-header between the two hosts."""
    addresses = int.from_bytes(b"".join(ADDRESSES[version]), "big")
    return pseudo_sum(addresses, protocol, length)


def tcp_packet(
    version: int,
    payload: bytes,
    *,
    seq: int = 1000,
    flags: int = 0x10,
    options: bytes = b"",
    unfinished: bool = False,
    **ip: int,
) -> bytes:
    """A TCP segment, with its checksum or the sum of the pseudo-header instead."""
    head = 20 + len(options)
    segment = bytearray(struct.pack(">HHIIBBHHH", 5001, 80, seq, 555, head << 2, flags, 500, 0, 0))
    segment += options + payload
    total = pseudo(version, 6, len(segment))
    check = partial(total) if unfinished else finished(total + ones_sum(segment))
    struct.pack_into(">H", segment, 16, check)
    return ip_packet(version, 6, bytes(segment), **ip)


def udp_packet(version: int, payload: bytes, *, unfinished: bool = False, **ip: int) -> bytes:
    """A UDP datagram."""
    datagram = bytearray(struct.pack(">HHHH", 5001, 53, 8 + len(payload), 0)) + payload
    total = pseudo(version, 17, len(datagram))
    check = partial(total) if unfinished else finished(total + ones_sum(datagram)) or 0xFFFF
    struct.pack_into(">H", datagram, 6, check)
    return ip_packet(version, 17, bytes(datagram), **ip)


def head_bytes(packet: bytes) -> int:
    """Bytes of the IP and transport header of a packet made here."""
    transport = 20 if packet[0] >> 4 == 4 else 40
    tcp = packet[9 if transport == 20 else 6] == 6
    return transport + ((packet[transport + 12] >> 4) * 4 if tcp else 8)


def virtio_of(packet: bytes, size: int) -> tuple[int, ...]:
    """The virtio header that a TUN gives a super-packet."""
    version, transport = packet[0] >> 4, 20 if packet[0] >> 4 == 4 else 40
    tcp = packet[9 if version == 4 else 6] == 6
    kind = virtio.GSO_UDP_L4
    if tcp:
        kind = virtio.GSO_TCPV4 if version == 4 else virtio.GSO_TCPV6
    head = head_bytes(packet)
    return (virtio.NEEDS_CSUM, kind, head, size, transport, 16 if tcp else 6)


def datagrams(sends: Sequence[tuple[Sequence[Buffer], int]]) -> list[bytes]:
    """What the kernel puts on the wire for these sends."""
    found = []
    for buffers, size in sends:
        data = b"".join(buffers)
        assert len(data) <= 65_507
        step = size or len(data)
        parts = [data[i : i + step] for i in range(0, len(data), step)]
        assert 1 <= len(parts) <= 64
        found += parts
    return found


def cut_by_kernel(written: Buffer) -> list[bytes]:
    """IP packets that a TUN makes of what is written, as Linux does where it has to cut.

    An independent way of cutting, byte by byte, for what tests write.
    """
    flags, kind, _, size, start, offset = virtio.unpack_from(written, 0)
    packet = bytes(written[virtio.HEADER_BYTES :])
    if not kind:
        if flags & virtio.NEEDS_CSUM:
            packet = _complete(packet, start, offset)
        return [packet]
    assert flags & virtio.NEEDS_CSUM
    head = head_bytes(packet)
    payload = packet[head:]
    version = packet[0] >> 4
    parts = [payload[i : i + size] for i in range(0, len(payload), size)]
    packets = []
    for i, part in enumerate(parts):
        header = bytearray(packet[:head])
        length = head + len(part)
        if version == 4:
            ident = (packet[4] << 8 | packet[5]) + i & 0xFFFF
            struct.pack_into(">HH", header, 2, length, ident)
            header[10:12] = bytes(2)
            struct.pack_into(">H", header, 10, finished(ones_sum(header[:20])))
        else:
            struct.pack_into(">H", header, 4, length - 40)
        if offset == 16:
            seq = int.from_bytes(packet[start + 4 : start + 8], "big") + i * size & 0xFFFFFFFF
            struct.pack_into(">I", header, start + 4, seq)
            if i < len(parts) - 1:
                header[start + 13] &= ~0x09
        else:
            struct.pack_into(">H", header, start + 4, length - start)
        total = pseudo(version, packet[9 if version == 4 else 6], length - start)
        struct.pack_into(">H", header, start + offset, partial(total))
        packets.append(_complete(bytes(header) + part, start, offset))
    return packets


def _complete(packet: bytes, start: int, offset: int) -> bytes:
    check = finished(ones_sum(packet[start:]))
    done = bytearray(packet)
    struct.pack_into(">H", done, start + offset, check or (0xFFFF if offset == 6 else 0))
    return bytes(done)


def tcp_options() -> st.SearchStrategy[bytes]:
    """Nothing, or timestamps."""
    stamp = b"\x01\x01\x08\x0a" + bytes(range(8))
    return st.sampled_from([b"", stamp])


def payloads(most: int = 65_000) -> st.SearchStrategy[bytes]:
    """Payloads that no two parts of look alike, of sizes that matter."""
    sizes = st.one_of(st.integers(1, 5000), st.integers(1, most))
    return st.builds(
        lambda size, seed: (
            (struct.pack(">I", seed) + bytes(range(251)))[: 4 + seed % 247]
            * (size // (4 + seed % 247) + 1)
        ),
        sizes,
        st.integers(0, 1 << 31),
    ).flatmap(lambda data: sizes.map(lambda size: data[:size] or b"x"))
