"""The sender and the receiver, with sockets in place of TUN and underlay."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshnet.vtep.engine import ENGINES
from meshnet.wire import virtio
from tests.unit.ends import MTU, NativeEnds, PythonEnds, datagrams_of
from tests.unit.packets import cut_by_kernel, tcp_packet, udp_packet, virtio_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Ends = PythonEnds | NativeEnds
SEGMENT = {4: 1398, 6: 1378}
"""Payload of segments as large as with timestamps."""


@pytest.fixture(params=ENGINES)
def make_ends(request: pytest.FixtureRequest) -> Iterator[Callable[..., Ends]]:
    """What both engines have to do alike."""
    with contextlib.ExitStack() as stack:

        def make(*, offload: bool = False, segmenting: bool = True) -> Ends:
            made: Ends
            if request.param == "python":
                made = PythonEnds(offload=offload, segmenting=segmenting)
            else:
                made = NativeEnds(offload=offload, segmenting=segmenting)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def make_python_ends() -> Iterator[Callable[..., PythonEnds]]:
    """With an underlay that refuses: the native engine calls the real one."""
    with contextlib.ExitStack() as stack:

        def make(refuse: dict[bool, int] | None = None, *, segmenting: bool = True) -> PythonEnds:
            made = PythonEnds(refuse, segmenting=segmenting)
            stack.callback(made.close)
            return made

        yield make


def _back(datagram: bytes) -> bytes:
    """A datagram to the peer as one from it: addresses and MACs the other way round."""
    data = bytearray(datagram)
    data[8:14], data[14:20] = data[14:20], data[8:14]
    at = 34 if data[22] >> 4 == 4 else 30
    size = 4 if at == 34 else 16
    data[at : at + size], data[at + size : at + 2 * size] = (
        data[at + size : at + 2 * size],
        data[at : at + size],
    )
    return bytes(data)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("version", [4, 6])
def test_there_and_back(make_ends: Callable[..., Ends], version: int, offload: bool) -> None:
    """Packets of all kinds, in one go, come back as they were cut."""
    ends = make_ends(offload=offload)
    packets = [(tcp_packet(version, bytes(range(256)) * 100, unfinished=True), SEGMENT[version])]
    packets += [(udp_packet(version, bytes((i,)) * 64, ident=i), 0) for i in range(100)]
    sizes = (0, 1, 700, 1300, 100, 100, 99, 100)
    packets += [(udp_packet(version, bytes(n), ident=500 + i), 0) for i, n in enumerate(sizes)]
    expected = []
    for packet, size in packets:
        ends.route(packet, size)
        header = virtio.pack(*virtio_of(packet, size)) if size else virtio.PLAIN
        expected += cut_by_kernel(header + packet)
    ends.carry_out()
    sent = ends.take_sent()
    assert len(sent) < 12
    assert ends.peer.tx_packets == len(expected)
    assert ends.peer.tx_calls == len(sent)
    for data, size in sent:
        step = size or len(data)
        parts = [_back(data[i : i + step]) for i in range(0, len(data), step)]
        ends.hand(b"".join(parts), size)
    ends.carry_in()
    got = ends.read()
    forth = [_back(bytes(22) + packet)[22:] for packet in expected]
    assert got == forth
    assert ends.peer.rx_packets == len(expected)
    assert not ends.peer.drops
    assert not ends.counters.drops


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("change", ["", "push", "gap", "other"])
def test_the_end_of_a_super_packet_follows(
    make_ends: Callable[..., Ends], version: int, change: str
) -> None:
    """64 KiB come as two trains, and are written as one super-packet again, if they are one."""
    ends = make_ends(offload=True)
    size = SEGMENT[version]
    whole = tcp_packet(version, os.urandom(46 * size), unfinished=True, flags=0x18, ident=0xFFF0)
    ends.route(whole, size)
    ends.carry_out()
    sent = ends.take_sent()
    assert [len(data) // size for data, size in sent] == [44, 2]
    expected = []
    for data, size in sent:
        parts = [_back(data[i : i + size]) for i in range(0, len(data), size)]
        if change == "gap" and len(parts) == 2:
            parts = [tcp_like(p, seq=9) for p in parts]
        if change == "push" and len(parts) == 44:
            parts[-1] = tcp_like(parts[-1], flags=0x18)
        if change == "other" and len(parts) == 2:
            parts = [tcp_like(p, window=3) for p in parts]
        ends.hand(b"".join(parts), size)
        expected += [part[22:] for part in parts]
    ends.carry_in()
    written = ends.take_writes()
    assert len(written) == (2 if change else 1)
    got = [packet for data in written for packet in cut_by_kernel(data)]
    assert [_without_check(p) for p in got] == [_without_check(p) for p in expected]
    assert ends.peer.rx_packets == 46


def tcp_like(datagram: bytes, *, seq: int = 0, flags: int = 0, window: int = 0) -> bytes:
    """A datagram whose TCP header differs; its checksum is unfinished and so stays right."""
    data, at = bytearray(datagram), 22 + (20 if datagram[22] >> 4 == 4 else 40)
    data[at + 7] ^= seq
    data[at + 13] |= flags
    data[at + 15] ^= window
    return bytes(data)


def _without_check(packet: bytes) -> bytes:
    at = 16 + (20 if packet[0] >> 4 == 4 else 40)
    return packet[:at] + packet[at + 2 :]


def test_a_kernel_that_does_not_segment(make_ends: Callable[..., Ends]) -> None:
    packet = tcp_packet(4, bytes(10_000), unfinished=True)
    found = []
    for segmenting in (True, False):
        ends = make_ends(segmenting=segmenting)
        ends.route(packet, 1000)
        ends.carry_out()
        found.append(ends.take_sent())
        assert ends.peer.tx_packets == 10
    assert [size for _, size in found[1]] == [0] * 10
    assert datagrams_of(found[0]) == datagrams_of(found[1])


@pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL, errno.EMSGSIZE])
def test_a_link_that_does_not_segment(
    make_python_ends: Callable[..., PythonEnds], error: int
) -> None:
    packet = tcp_packet(4, bytes(10_000), unfinished=True)
    ends = make_python_ends({True: error})
    ends.route(packet, 1000)
    ends.carry_out()
    assert [size for _, size in ends.take_sent()] == [0] * 10
    assert ends.peer.tx_packets == 10
    assert not ends.peer.drops


def test_what_the_underlay_refuses_is_counted(
    make_python_ends: Callable[..., PythonEnds],
) -> None:
    for error, reason in (
        (errno.EAGAIN, "tx_congested"),
        (errno.EMSGSIZE, "tx_too_big"),
        (errno.EPERM, "tx_EPERM"),
    ):
        ends = make_python_ends({False: error, True: error})
        ends.route(udp_packet(4, bytes(5)))
        ends.route(tcp_packet(4, bytes(3000), unfinished=True), 1000)
        ends.carry_out()
        assert ends.peer.drops == {reason: 4}


def test_answers_are_limited(make_ends: Callable[..., Ends]) -> None:
    ends = make_ends()
    stranger = bytearray(udp_packet(4, bytes(5)))
    stranger[16:20] = bytes((10, 42, 77, 1))
    for _ in range(150):
        ends.route(bytes(stranger))
        ends.carry_out()
    assert ends.counters.drops == {"no_peer": 150}
    assert len(ends.read()) == 100
    assert not ends.take_sent()


def test_a_packet_of_a_larger_mtu_is_refused(make_ends: Callable[..., Ends]) -> None:
    ends = make_ends()
    ends.route(udp_packet(4, bytes(MTU - 27)))
    ends.route(udp_packet(4, bytes(MTU - 28)))
    ends.carry_out()
    (answer,) = ends.read()
    assert answer[20:22] == b"\x03\x04"
    assert int.from_bytes(answer[26:28], "big") == MTU
    assert len(ends.take_sent()) == 1


@pytest.mark.parametrize("data", [b"", b"\x45", bytes(10), bytes(60), b"\x45" + bytes(9)])
def test_nonsense_from_the_tun(make_ends: Callable[..., Ends], data: bytes) -> None:
    ends = make_ends()
    for header in (virtio.PLAIN, virtio.pack(1, 1, 0, 0, 0, 0), virtio.pack(1, 5, 9, 9, 9, 9)):
        ends.tun.send(header + data)
        ends.tun.send(header + data)
        ends.carry_out()
    assert not ends.take_sent()


@given(st.binary(max_size=120), st.integers(0, 255), st.integers(0, 3000), st.integers(0, 255),
       st.integers(0, 255), st.integers(20, 40))  # fmt: skip
def test_what_the_tun_never_says(
    data: bytes, kind: int, size: int, start: int, offset: int, length: int
) -> None:
    """Headers that fit nothing, before packets to a member: dropped, or sent as far as they go."""
    packet = bytearray(tcp_packet(4, data, unfinished=True)[: length + len(data)])
    with contextlib.closing(NativeEnds()) as ends:
        ends.tun.send(virtio.pack(1, kind, 0, size, start, offset) + packet)
        ends.tun.send(virtio.pack(1, 0, 0, size, start, offset) + packet)
        ends.carry_out()
        ends.route(udp_packet(4, b"alive"))
        ends.carry_out()
        assert ends.take_sent()[-1][0].endswith(b"alive")
