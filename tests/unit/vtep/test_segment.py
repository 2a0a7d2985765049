"""Super-packets, cut and joined: what scapy finds in every packet, and what comes out again."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.vxlan import VXLAN

from meshnet.vtep.engine import ENGINES
from meshnet.wire import virtio
from meshnet.wire.checksum import finished, ones_sum
from meshnet.wire.coalesce import Coalescer
from meshnet.wire.inner import Inner, describe
from meshnet.wire.segment import Cutter, complete
from meshnet.wire.train import TrainJoiner
from meshnet.wire.vxlan import ENCAPSULATION_BYTES, Encapsulation
from tests.unit import packets
from tests.unit.ends import NativeEnds, datagrams_of
from tests.unit.packets import (
    cut_by_kernel,
    datagrams,
    head_bytes,
    prefix,
    tcp_packet,
    udp_packet,
    virtio_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from meshnet.wire import Buffer

MTU = 1450
START = 22
versions = st.sampled_from([4, 6])
sizes = st.one_of(st.integers(536, 1398), st.just(1398), st.integers(64, 200))


engines = pytest.mark.parametrize("engine", ENGINES)
_native: dict[int, NativeEnds] = {}


@pytest.fixture(autouse=True, scope="module")
def _native_ends() -> Iterator[None]:
    """Hosts 1 and 2 with the native engine, for all tests and their examples."""
    with contextlib.ExitStack() as stack:
        for host in (1, 2):
            _native[host] = NativeEnds(host, mtu_bytes=1500)
            stack.callback(_native[host].close)
        yield


def cut(packet: bytes, size: int, *, engine: str = "python", remote: bool = False) -> list[bytes]:
    if engine == "native":
        ends = _native[1]
        ends.set_offload(remote)
        ends.route(packet, size)
        ends.carry_out()
        return datagrams_of(ends.take_sent())
    buffer = bytearray(START) + packet
    cutter = Cutter(buffer, START)
    front = prefix(packet[0] >> 4, (20 if packet[0] >> 4 == 4 else 40, False) if remote else None)
    header = virtio_of(packet, size)
    found = datagrams(cutter.cut(len(packet), header, front, remote=remote))
    # A second time from the layouts that are remembered.
    assert found == datagrams(cutter.cut(len(packet), header, front, remote=remote))
    return found


def checksums_right(packet: bytes) -> bool:
    """Whether scapy computes the very same checksums and lengths."""
    parsed = IP(packet) if packet[0] >> 4 == 4 else IPv6(packet)
    for layer in (IP, TCP, UDP):
        if layer in parsed:
            del parsed[layer].chksum
            if layer is not TCP:
                del parsed[layer].len
    return bytes(parsed) == packet


@given(versions, packets.payloads(), sizes, packets.tcp_options(), st.integers(0, 0xFFFFFFFF),
       st.sampled_from([0x10, 0x18, 0x19, 0x98]), st.integers(0, 0xFFFF))  # fmt: skip
@settings(max_examples=60, deadline=None)
@engines
def test_every_packet_cut_is_what_scapy_would_make(
    engine: str,
    version: int,
    payload: bytes,
    size: int,
    options: bytes,
    seq: int,
    flags: int,
    ident: int,
) -> None:
    whole = tcp_packet(
        version, payload, seq=seq, flags=flags, options=options, unfinished=True, ident=ident
    )
    found = cut(whole, size, engine=engine)
    assert len(found) == -(-len(payload) // size)
    stream = b""
    for i, datagram in enumerate(found):
        outer = VXLAN(datagram)
        assert (outer.vni, int(outer.flags)) == (packets.VNI, 8)
        assert (outer.dst, outer.src) == tuple(mac.hex(":") for mac in packets.MACS)
        packet = datagram[ENCAPSULATION_BYTES:]
        assert checksums_right(packet)
        segment = outer[TCP]
        assert segment.seq == seq + len(stream) & 0xFFFFFFFF
        last, first = i == len(found) - 1, i == 0
        allowed = ~0x99 | (0x09 if last else 0) | (0x80 if first else 0)
        assert int(segment.flags) == flags & (allowed | 0x10)
        if version == 4:
            assert outer[IP].id == ident + i & 0xFFFF
        data = packet[head_bytes(packet) :]
        assert len(data) == size or last
        stream += data
    assert stream == payload


@given(versions, packets.payloads(), sizes)
@settings(max_examples=30, deadline=None)
@engines
def test_every_datagram_cut_is_what_scapy_would_make(
    engine: str, version: int, payload: bytes, size: int
) -> None:
    whole = udp_packet(version, payload, unfinished=True)
    parts = [d[ENCAPSULATION_BYTES:] for d in cut(whole, size, engine=engine)]
    assert all(checksums_right(part) for part in parts)
    assert b"".join(part[head_bytes(part) :] for part in parts) == payload
    assert parts == cut_by_kernel(virtio.pack(*virtio_of(whole, size)) + whole)


@given(versions, packets.payloads(1400), st.booleans())
def test_a_single_packet_is_completed(version: int, payload: bytes, udp: bool) -> None:
    make: Any = udp_packet if udp else tcp_packet
    packet = bytearray(make(version, payload[:1400], unfinished=True))
    complete(memoryview(packet), 20 if version == 4 else 40, 6 if udp else 16)
    assert bytes(packet) == make(version, payload[:1400])
    assert checksums_right(bytes(packet))


WAYS = ("trains", "segments", "native")
ways = pytest.mark.parametrize("way", WAYS)


def receive(trains: list[list[bytes]], way: str) -> tuple[list[bytes], int]:
    """What a TUN makes of trains of datagrams (each of one size, as UDP_GRO has them).

    The Python engine has a way for trains and one for segments; the native engine has one.

    Returns:
        The packets, and how many writes they took.
    """
    if way == "native":
        ends = _native[2]
        writes = []
        for at in range(0, len(trains), 4):
            for train in trains[at : at + 4]:
                ends.hand(b"".join(train), len(train[0]))
            ends.carry_in()
            writes += ends.take_writes()
        return [packet for data in writes for packet in cut_by_kernel(data)], len(writes)
    written: list[list[Buffer]] = []
    coalescer = Coalescer()
    for train in trains:
        buffer = bytearray(b"".join(train))
        size = len(train[0])
        unfinished = Encapsulation(buffer).remote_start is not None
        joined = None
        if way == "trains" and len(train) > 1:
            joined = TrainJoiner(buffer).join(size, len(buffer), unfinished=unfinished)
        if joined is not None:
            written += [*coalescer.flush(), [bytes(b) for b in joined]]
            continue
        for at in range(0, len(buffer), size):
            end = min(at + size, len(buffer)) - START - at
            inner = Inner(buffer, at + START, end)
            packet = bytes(buffer[at + START : at + START + inner.length])
            ready = coalescer.push(packet, inner, unfinished=unfinished)
            if ready is None:
                front = describe(inner, packet, 0, MTU, unfinished=unfinished)
                assert front is not None
                ready = [*coalescer.flush_flow(packet, inner), [front, packet]]
            written += ready
    written += coalescer.flush()
    out: list[bytes] = []
    for buffers in written:
        out += cut_by_kernel(b"".join(buffers))
    return out, len(written)


@given(versions, packets.payloads(), sizes, packets.tcp_options(), st.booleans(), st.booleans(),
       st.data())  # fmt: skip
@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize("way", ["trains", "native"])
def test_cut_lose_any_and_join(
    way: str, version: int, payload: bytes, size: int, options: bytes, remote: bool, df: bool,
    data: st.DataObject,
) -> None:  # fmt: skip
    """Every packet that was not lost comes out as it was cut, once and in order."""
    ident = data.draw(st.sampled_from([0, 7, 0xFFF0]))
    seq = data.draw(st.sampled_from([0, 77, 0xFFFFF000]))
    flags = data.draw(st.sampled_from([0x10, 0x18, 0x19, 0x50, 0x98]))
    whole = tcp_packet(
        version, payload, seq=seq, flags=flags, options=options, unfinished=True, ident=ident, df=df
    )
    found = cut(whole, size, remote=remote)
    lost = data.draw(st.sets(st.integers(0, len(found) - 1), max_size=4))
    left = [d for i, d in enumerate(found) if i not in lost]
    trains = _trains(left, data.draw(st.integers(1, 44)))
    out, writes = receive(trains, way)
    expected = cut_by_kernel(virtio.pack(*virtio_of(whole, size)) + whole)
    if flags & 0x80:  # the kernel's way of cutting above leaves CWR alone
        expected = [d[START:] for d in cut(whole, size)]
    assert out == [p for i, p in enumerate(expected) if i not in lost]
    if not lost and not flags & 0x80:
        assert writes <= len(trains)


def _trains(found: list[bytes], most: int) -> list[list[bytes]]:
    """Neighbours of one size, of which the last may be shorter."""
    trains: list[list[bytes]] = []
    for datagram in found:
        train = trains[-1] if trains else None
        if train and len(train) < most and len(train[-1]) == len(train[0]) >= len(datagram):
            train.append(datagram)
        else:
            trains.append([datagram])
    return trains


@given(versions, st.integers(2, 40), st.integers(1, 700), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("way", ["trains", "native"])
def test_udp_trains(
    way: str, version: int, count: int, size: int, same: bool, data: st.DataObject
) -> None:
    first = data.draw(st.sampled_from([0, 0xFFF8]))
    last = data.draw(st.integers(1, size))
    found = [
        udp_packet(
            version,
            bytes((i + k) & 0xFF for k in range(last if i == count - 1 else size)),
            ident=first if same else first + i & 0xFFFF,
        )
        for i in range(count)
    ]
    train = [prefix(version) + p for p in found]
    out, writes = receive([train], way)
    if (size | version) % 2 == 0 and not same:
        assert (out, writes) == (found, 1)
    elif version == 4 and same:
        # The identification may change where DF makes it meaningless (RFC 6864).
        assert [p[20:] for p in out] == [p[20:] for p in found]
    else:
        assert out == found


@given(versions, st.data())
@settings(max_examples=50, deadline=None)
@ways
def test_corruption_is_never_laundered(way: str, version: int, data: st.DataObject) -> None:
    """A byte that changed on the way is still detectably wrong at the end."""
    payload = bytes(i * 7 & 0xFF for i in range(3000))
    whole = tcp_packet(version, payload, unfinished=True)
    found = cut(whole, 500)
    which = data.draw(st.integers(0, len(found) - 1))
    header = 20 if version == 4 else 40
    at = START + header + data.draw(st.integers(0, 519))
    broken = bytearray(found[which])
    flip = data.draw(st.integers(1, 255))
    broken[at] ^= flip
    found[which] = bytes(broken)
    out, _ = receive(_trains(found, 44), way)
    good = {p for p in out if checksums_right(p) and _offset_right(p)}
    expected = [d[START:] for d in cut(whole, 500)]
    assert set(expected) - good == {expected[which]}
    assert not [p for p in good if p not in expected]


def _offset_right(packet: bytes) -> bool:
    """scapy writes back a nonsense data offset as it found it; a receiver does not."""
    transport = 20 if packet[0] >> 4 == 4 else 40
    inner = Inner(packet, 0, len(packet))
    pseudo = inner.source + inner.destination + 6 + len(packet) - transport
    total: int = ones_sum(packet[transport:]) + pseudo
    return total % 0xFFFF == 0


@pytest.mark.parametrize("change", ["ttl", "tos", "df", "ack", "window", "options", "flags", "gap"])
@ways
def test_segments_that_differ_are_not_joined(change: str, way: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "tos": {"tos": 3}, "df": {"df": False}, "flags": {"flags": 0x50}, "gap": {"seq": 1101},
        "options": {"options": b"\x01\x01\x08\x0a" + bytes(8)},
    }  # fmt: skip
    a = tcp_packet(4, bytes(100), seq=1000, ident=1)
    b = bytearray(tcp_packet(4, bytes(100), **{"seq": 1100, "ident": 2, **changes.get(change, {})}))
    at = {"ttl": 8, "ack": 31, "window": 35}.get(change)
    if at is not None:
        b[at] ^= 1
        b[10:12] = bytes(2)
        b[10:12] = finished(ones_sum(b[:20])).to_bytes(2, "big")
        b[36:38] = bytes(2)
        total = ones_sum(b[20:]) + packets.pseudo(4, 6, len(b) - 20)
        b[36:38] = finished(total).to_bytes(2, "big")
    assert checksums_right(bytes(b))
    train = [prefix(4) + a, prefix(4) + bytes(b)]
    trains = [train] if len(train[0]) >= len(train[1]) else [[d] for d in train]
    out, writes = receive(trains, way)
    assert (out, writes) == ([a, bytes(b)], 2)


@pytest.mark.parametrize("version", [4, 6])
def test_frames_of_a_kernel_peer_over_veth(version: int) -> None:
    """Unfinished checksums, and super-packets whose segment size is lost."""
    small = tcp_packet(version, bytes(100), unfinished=True)
    head = head_bytes(small)
    front = describe(Inner(small, 0, len(small)), small, 0, MTU)
    assert front == virtio.pack(virtio.NEEDS_CSUM, 0, head, 0, head - 20, 16)
    done = tcp_packet(version, bytes(100))
    assert describe(Inner(done, 0, len(done)), done, 0, MTU) == virtio.PLAIN
    large = tcp_packet(version, bytes(60_000), unfinished=True)
    front = describe(Inner(large, 0, len(large)), large, 0, MTU)
    assert front is not None
    parts = cut_by_kernel(front + large)
    assert all(len(p) <= MTU and checksums_right(p) for p in parts)
    assert max(len(p) for p in parts) == MTU
    lost = udp_packet(version, bytes(60_000), unfinished=True)
    assert describe(Inner(lost, 0, len(lost)), lost, 0, MTU) is None


@given(st.binary(max_size=120))
def test_garbage_is_an_inner_packet_or_a_value_error(data: bytes) -> None:
    try:
        inner = Inner(data, 0, len(data))
    except ValueError:
        return
    describe(inner, data, 0, MTU)
    coalescer = Coalescer()
    packet = data[: inner.length]
    if coalescer.push(packet, inner, unfinished=False) is None:
        coalescer.flush_flow(packet, inner)
    coalescer.flush()


@given(st.binary(min_size=22, max_size=300), st.integers(1, 100))
def test_garbage_is_no_train(data: bytes, size: int) -> None:
    view = bytearray(data)
    joined = TrainJoiner(view).join(size, len(view), unfinished=False)
    assert joined is None
