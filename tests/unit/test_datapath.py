"""The sender and the receiver with a TUN and an underlay that are not there."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Any, cast

import pytest

from meshnet.kernel.tun import Tun, Underlay
from meshnet.vtep.counters import Counters
from meshnet.vtep.peers import Own, Peer, PeerTable
from meshnet.vtep.prober import Prober
from meshnet.vtep.receiver import Receiver
from meshnet.vtep.sender import Sender
from meshnet.wire import virtio
from tests.unit.packets import MACS, VNI, cut_by_kernel, tcp_packet, udp_packet, virtio_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MTU = 1450
OWN_IP, PEER_IP = "192.0.2.1", "192.0.2.2"


class Wire:
    """A socket that keeps what is sent, or refuses it, and hands over what it is given."""

    def __init__(self, refuse: dict[bool, int] | None = None) -> None:
        self.sent: list[tuple[bytes, int]] = []
        self.waiting: list[tuple[bytes, int]] = []
        self._refuse = refuse or {}

    def sendmsg(
        self, buffers: Sequence[bytes], controls: Sequence[Any], _: int, address: tuple[str, int]
    ) -> int:
        assert address == (PEER_IP, 4789)
        error = self._refuse.get(bool(controls))
        if error:
            raise OSError(error, os.strerror(error))
        data = b"".join(buffers)
        self.sent.append((data, int.from_bytes(controls[0][2], "little") if controls else 0))
        return len(data)

    def recvmsg_into(self, buffers: list[bytearray], *_: int) -> tuple[int, list[Any], int, Any]:
        if not self.waiting:
            raise BlockingIOError
        data, size = self.waiting.pop(0)
        buffers[0][: len(data)] = data
        controls = [(17, 104, size.to_bytes(4, "little"))] if size else []
        return len(data), controls, 0, (PEER_IP, 5)

    def datagrams(self) -> list[bytes]:
        found = []
        for data, size in self.sent:
            step = size or len(data)
            found += [data[i : i + step] for i in range(0, len(data), step)]
        return found


class Ends:
    """Host 1 with a peer, host 2; what is written to `tun` is what the kernel routes there."""

    def __init__(self, refuse: dict[bool, int] | None, offload: bool, segmenting: bool) -> None:
        self.tun, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        inner.setblocking(False)
        self.tun.setblocking(False)
        self._inner = inner
        self.wire = Wire(refuse)
        self.counters = Counters()
        table = PeerTable(Own(VNI, MACS[1], 4789, 4))
        document = {"underlay_ip": PEER_IP, "mac": MACS[0].hex(":"), "offload": offload,
                    "subnets": ["10.42.2.0/24", "fd00:42:0:2::/64"]}  # fmt: skip
        table.replace([document])
        self.peer: Peer = table.by_underlay[PEER_IP]
        underlay = Underlay(cast("Any", self.wire), "0.0.0.1", segmenting=segmenting, trains=True)
        tun = Tun(inner.fileno(), "tu0", uso=True)
        self.sender = Sender(tun, underlay, table, self.counters, MTU)
        self.prober = Prober(cast("Any", self.wire), table, self.counters, None)
        self.receiver = Receiver(tun, underlay, table, self.counters, MTU, self.prober)
        # No way to anybody, so that it sends by the wire above.
        self.sender._connect = lambda peer: False  # type: ignore[method-assign]

    def close(self) -> None:
        self.tun.close()
        self._inner.close()

    def route(self, packet: bytes, size: int = 0) -> None:
        """Route a packet into the TUN."""
        header = virtio.pack(*virtio_of(packet, size)) if size else virtio.PLAIN
        self.tun.send(header + packet)

    def read(self) -> list[bytes]:
        """IP packets that were written to the TUN."""
        found = []
        while True:
            try:
                found += cut_by_kernel(self.tun.recv(70_000))
            except BlockingIOError:
                return found


@pytest.fixture
def make_ends() -> Iterator[Callable[..., Ends]]:
    made: list[Ends] = []

    def make(
        refuse: dict[bool, int] | None = None, *, offload: bool = False, segmenting: bool = True
    ) -> Ends:
        made.append(Ends(refuse, offload, segmenting))
        return made[-1]

    yield make
    for ends in made:
        ends.close()


def _back(ends: Ends, datagram: bytes) -> bytes:
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
    packets = [(tcp_packet(version, bytes(range(256)) * 100, unfinished=True), 1398)]
    packets += [(udp_packet(version, bytes((i,)) * 64, ident=i), 0) for i in range(100)]
    sizes = (0, 1, 700, 1300, 100, 100, 99, 100)
    packets += [(udp_packet(version, bytes(n), ident=500 + i), 0) for i, n in enumerate(sizes)]
    expected = []
    for packet, size in packets:
        ends.route(packet, size)
        header = virtio.pack(*virtio_of(packet, size)) if size else virtio.PLAIN
        expected += cut_by_kernel(header + packet)
    while ends.sender.pump(64):
        pass
    sent = ends.wire.sent
    assert len(sent) < 12
    assert ends.peer.tx_packets == len(expected)
    assert ends.peer.tx_calls == len(sent)
    for data, size in sent:
        step = size or len(data)
        parts = [_back(ends, data[i : i + step]) for i in range(0, len(data), step)]
        ends.wire.waiting.append((b"".join(parts), size))
    while ends.receiver.pump(4):
        pass
    got = ends.read()
    forth = [_back(ends, bytes(22) + packet)[22:] for packet in expected]
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
    whole = tcp_packet(version, os.urandom(46 * 1398), unfinished=True, flags=0x18, ident=0xFFF0)
    ends.route(whole, 1398)
    ends.sender.pump(2)
    assert [len(data) // size for data, size in ends.wire.sent] == [44, 2]
    for data, size in ends.wire.sent:
        parts = [_back(ends, data[i : i + size]) for i in range(0, len(data), size)]
        if change == "gap" and len(parts) == 2:
            parts = [tcp_like(p, seq=9) for p in parts]
        if change == "push" and len(parts) == 44:
            parts[-1] = tcp_like(parts[-1], flags=0x18)
        if change == "other" and len(parts) == 2:
            parts = [tcp_like(p, window=3) for p in parts]
        ends.wire.waiting.append((b"".join(parts), size))
    expected = [
        data[i : i + size][22:]
        for data, size in ends.wire.waiting
        for i in range(0, len(data), size)
    ]
    ends.receiver.pump(4)
    written = []
    while True:
        try:
            written.append(ends.tun.recv(70_000))
        except BlockingIOError:
            break
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


@pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL, errno.EMSGSIZE])
def test_a_kernel_that_does_not_segment(make_ends: Callable[..., Ends], error: int) -> None:
    packet = tcp_packet(4, bytes(10_000), unfinished=True)
    whole = make_ends()
    refusing = make_ends({True: error})
    lacking = make_ends(segmenting=False)
    for ends in (whole, refusing, lacking):
        ends.route(packet, 1000)
        assert ends.sender.pump(2) == 1
    assert [size for _, size in refusing.wire.sent] == [0] * 10
    assert whole.wire.datagrams() == refusing.wire.datagrams() == lacking.wire.datagrams()
    assert refusing.peer.tx_packets == 10
    assert not refusing.peer.drops


def test_what_the_underlay_refuses_is_counted(make_ends: Callable[..., Ends]) -> None:
    for error, reason in (
        (errno.EAGAIN, "tx_congested"),
        (errno.EMSGSIZE, "tx_too_big"),
        (errno.EPERM, "tx_EPERM"),
    ):
        ends = make_ends({False: error, True: error})
        ends.route(udp_packet(4, bytes(5)))
        ends.route(tcp_packet(4, bytes(3000), unfinished=True), 1000)
        assert ends.sender.one() == 1
        assert ends.sender.pump(8) == 1
        assert ends.peer.drops == {reason: 4}


def test_answers_are_limited(make_ends: Callable[..., Ends]) -> None:
    ends = make_ends()
    stranger = bytearray(udp_packet(4, bytes(5)))
    stranger[16:20] = bytes((10, 42, 77, 1))
    for _ in range(150):
        ends.route(bytes(stranger))
        ends.sender.one()
        ends.sender.pump(2)
    assert ends.counters.drops == {"no_peer": 150}
    assert len(ends.read()) == 100
    assert not ends.wire.sent


def test_a_packet_of_a_larger_mtu_is_refused(make_ends: Callable[..., Ends]) -> None:
    ends = make_ends()
    ends.route(udp_packet(4, bytes(MTU - 27)))
    ends.route(udp_packet(4, bytes(MTU - 28)))
    assert ends.sender.pump(4) == 2
    (answer,) = ends.read()
    assert answer[20:22] == b"\x03\x04"
    assert int.from_bytes(answer[26:28], "big") == MTU
    assert len(ends.wire.datagrams()) == 1


@pytest.mark.parametrize("data", [b"", b"\x45", bytes(10), bytes(60), b"\x45" + bytes(9)])
def test_nonsense_from_the_tun(make_ends: Callable[..., Ends], data: bytes) -> None:
    ends = make_ends()
    for header in (virtio.PLAIN, virtio.pack(1, 1, 0, 0, 0, 0), virtio.pack(1, 5, 9, 9, 9, 9)):
        ends.tun.send(header + data)
        ends.tun.send(header + data)
        ends.sender.one()
        ends.sender.pump(4)
    assert not ends.wire.sent
