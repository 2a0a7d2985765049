"""An engine, in Python or native, with sockets of this process in place of TUN and underlay.

The native engine has real UDP sockets on the loopback, with UDP_SEGMENT and UDP_GRO, because it
calls the kernel itself.  Nothing here needs root.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import TYPE_CHECKING, Any, cast

from meshnet.vtep.counters import Counters
from meshnet.vtep.engine import Parts
from meshnet.vtep.native import library
from meshnet.vtep.native.engine import NativeEngine
from meshnet.vtep.peers import Own, PeerTable
from meshnet.vtep.probe_exchange import ProbeExchange
from meshnet.vtep.python.receiver import Receiver
from meshnet.vtep.python.sender import Sender
from meshnet.vtep.tun import Tun
from meshnet.vtep.underlay_socket import (
    SOL_UDP,
    UDP_GRO,
    UDP_SEGMENT,
    UnderlaySocket,
    open_underlay,
)
from meshnet.wire import virtio
from tests.unit.packets import MACS, VNI, cut_by_kernel, virtio_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meshnet.vtep.peers import TunnelPeer

MTU = 1450
_OWN_IP, _PEER_IP = "127.0.0.1", "127.0.0.2"
_FAR_IP = "192.0.2.2"
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_ROOM_BYTES = 8 << 20


def _make_tun() -> tuple[socket.socket, socket.socket]:
    """The routes' end of a TUN, and the engine's."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        _enlarge(end)
    return ends


def _enlarge(made: socket.socket) -> None:
    made.setblocking(False)
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        with contextlib.suppress(PermissionError):
            made.setsockopt(socket.SOL_SOCKET, option, _ROOM_BYTES)


def _describe_host(host: int, underlay_ip: str, port: int, *, offload: bool) -> dict[str, Any]:
    """One of the two hosts of `tests.unit.packets`, as a peer."""
    return {
        "underlay_ip": underlay_ip,
        "port": port,
        "mac": MACS[2 - host].hex(":"),
        "offload": offload,
        "subnets": [f"10.42.{host}.0/24", f"fd00:42:0:{host}::/64"],
    }


class _Ends:
    """What both have in common: the TUN."""

    tun: socket.socket

    def route(self, packet: bytes, size: int = 0) -> None:
        """Route a packet into the TUN."""
        header = virtio.pack(*virtio_of(packet, size)) if size else virtio.PLAIN
        self.tun.send(header + packet)

    def take_writes(self) -> list[bytes]:
        """What was written to the TUN since the last call, virtio headers first."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.tun.recv(70_000))
        return found

    def read(self) -> list[bytes]:
        """IP packets that were written to the TUN since the last call."""
        return [packet for data in self.take_writes() for packet in cut_by_kernel(data)]


class Wire:
    """A socket that keeps what is sent, or refuses it, and hands over what it is given."""

    def __init__(self, refuse: dict[bool, int] | None = None) -> None:
        self.sent: list[tuple[bytes, int]] = []
        self.waiting: list[tuple[bytes, int]] = []
        self._refuse = refuse or {}

    def sendmsg(
        self, buffers: Sequence[bytes], controls: Sequence[Any], _: int, address: tuple[str, int]
    ) -> int:
        assert address == (_FAR_IP, 4789)
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
        return len(data), controls, 0, (_FAR_IP, 5)


class PythonEnds(_Ends):
    """The Python engine's sender and receiver on host 1; the underlay is a `Wire`.

    Args:
        refuse: what the underlay says to sends with UDP_SEGMENT (True), and to others.
        offload: whether the other host takes unfinished checksums.
        segmenting: whether the kernel has UDP_SEGMENT.
    """

    def __init__(
        self,
        refuse: dict[bool, int] | None = None,
        *,
        offload: bool = False,
        segmenting: bool = True,
    ) -> None:
        self.tun, self._inner = _make_tun()
        self.wire = Wire(refuse)
        self.counters = Counters()
        table = PeerTable(Own(VNI, MACS[1], 4789, 4))
        table.replace([_describe_host(2, _FAR_IP, 4789, offload=offload)])
        self.peer: TunnelPeer = table.by_underlay[_FAR_IP]
        underlay = UnderlaySocket(
            cast("Any", self.wire), "0.0.0.1", segmenting=segmenting, trains=True
        )
        tun = Tun(self._inner.fileno(), "tu0", uso=True)
        self.sender = Sender(tun, underlay, table, self.counters, MTU)
        probes = ProbeExchange(cast("Any", self.wire), table, self.counters, None)
        self.receiver = Receiver(tun, underlay, table, self.counters, MTU, probes)
        # No way to anybody, so that it sends by the wire above.
        self.sender._connect = lambda peer: False  # type: ignore[method-assign]

    def close(self) -> None:
        self.tun.close()
        self._inner.close()

    def carry_out(self) -> None:
        """Let it carry what was routed: the first packet as one that comes alone."""
        if self.sender.one():
            while self.sender.pump(64):
                pass

    def take_sent(self) -> list[tuple[bytes, int]]:
        """What was sent since the last call: bytes, and the size of a datagram, or 0."""
        found = self.wire.sent
        self.wire.sent = []
        return found

    def hand(self, data: bytes, size: int = 0) -> None:
        """Send from the other host: one datagram, or a train of datagrams of one size."""
        self.wire.waiting.append((data, size))

    def carry_in(self) -> None:
        """Let it carry what was handed."""
        while self.receiver.pump(4):
            pass


class NativeEnds(_Ends):
    """The native engine of one host, and what is outside of it: a TUN's routes and the other host.

    Args:
        host: which of the two hosts of `tests.unit.packets` it is.
        offload: whether the other one takes unfinished checksums.
        segmenting: whether the kernel has UDP_SEGMENT.
    """

    def __init__(
        self,
        host: int = 1,
        *,
        offload: bool = False,
        segmenting: bool = True,
        mtu_bytes: int = MTU,
    ) -> None:
        library.build()
        self.tun, self._inner = _make_tun()
        self._far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        _enlarge(self._far)
        self._far.setsockopt(SOL_UDP, UDP_GRO, 1)
        self._far.bind((_PEER_IP, 0))
        self._underlay = open_underlay(_OWN_IP, 0)
        self._underlay.segmenting = segmenting
        self._table = PeerTable(Own(VNI, MACS[2 - host], 4789, 4))
        self._host = host
        self._never, called = socket.socketpair()
        self._called = called
        self.counters = Counters()
        probes = ProbeExchange(self._underlay.socket, self._table, self.counters, None)
        tun = Tun(self._inner.fileno(), "tu0", uso=True)
        self.set_offload(offload, known=False)
        parts = Parts(
            tun, self._underlay, self._table, self.counters, mtu_bytes, probes, called.fileno()
        )
        self.engine = NativeEngine(parts)

    def set_offload(self, offload: bool, *, known: bool = True) -> None:
        """Say whether the other host takes unfinished checksums; `known`: the engine is there."""
        port = self._far.getsockname()[1]
        document = _describe_host(3 - self._host, _PEER_IP, port, offload=offload)
        if known:
            self.engine.collect()
        self._table.replace([document])
        if known:
            self.engine.members_changed()

    def set_members(self, documents: list[dict[str, Any]]) -> PeerTable:
        """Make these the members; nobody listens there."""
        self.engine.collect()
        self._table.replace(documents)
        self.engine.members_changed()
        return self._table

    @property
    def peer(self) -> TunnelPeer:
        """The other host, as the engine's process knows it."""
        self.engine.collect()
        return self._table.by_underlay[_PEER_IP]

    def close(self) -> None:
        self.engine.close()
        ends = (self.tun, self._inner, self._far, self._underlay.socket)
        for made in (*ends, self._never, self._called):
            made.close()

    def carry_out(self) -> None:
        """Let the engine carry what was routed."""
        self._carry(self._inner)

    def take_sent(self) -> list[tuple[bytes, int]]:
        """What arrived at the other host since the last call: bytes, and the size of a datagram."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, controls, _, _ = self._far.recvmsg(65_536, socket.CMSG_SPACE(4))
                found.append((data, int.from_bytes(controls[0][2], "little") if controls else 0))
        return found

    def hand(self, data: bytes, size: int = 0) -> None:
        """Send from the other host: one datagram, or a train of datagrams of one size."""
        segmented = 0 < size < len(data)
        controls = [(SOL_UDP, UDP_SEGMENT, size.to_bytes(2, "little"))] if segmented else []
        self._far.sendmsg([data], controls, 0, self._underlay.socket.getsockname())

    def carry_in(self) -> None:
        """Let the engine carry what was handed."""
        self._carry(self._underlay.socket)

    def _carry(self, waiting: socket.socket) -> None:
        while select.select([waiting], [], [], 0)[0]:
            self.engine.run(0.0)


def datagrams_of(sent: Sequence[tuple[bytes, int]]) -> list[bytes]:
    """The datagrams of what `take_sent` found."""
    found: list[bytes] = []
    for data, size in sent:
        step = size or len(data)
        found += [data[i : i + step] for i in range(0, len(data), step)]
    return found
