"""Inward: from the underlay to the TUN.

::

    outer source ── a member's? ── encapsulation ── ours? ── inner source ── that member's? ── TUN
                        │                             │                          │
                    not_member           bad_header, wrong_vni,           spoofed_source
                                         not_our_mac, malformed

A frame of the probes' type belongs to the exchange of probes (`meshnet.vtep.probe_exchange`).

One ``recvmsg`` may hand over a *train* (``UDP_GRO``): datagrams of one size, side by side.  Most
often it is one super-packet that the sender cut, and goes to the TUN as one write, its payload
straight from the buffer it was received in.  Else, and for datagrams that come one by one while
more are waiting, TCP segments are joined by the coalescer.

A virtio header is written into the 22 bytes of encapsulation before a packet, so that one that
goes on alone is not copied either.  The buffer belongs to this object; what the coalescer holds are
copies, and it holds nothing once `pump` returns.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

from meshnet.wire import probe, virtio
from meshnet.wire.checksum import partial
from meshnet.wire.coalesce import Coalescer
from meshnet.wire.inner import TCP, UDP, Inner, describe
from meshnet.wire.train import TrainJoiner, extend
from meshnet.wire.vxlan import (
    ENCAPSULATION_BYTES,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    Encapsulation,
)

if TYPE_CHECKING:
    from meshnet.vtep.counters import Counters
    from meshnet.vtep.peers import PeerTable, TunnelPeer
    from meshnet.vtep.probe_exchange import ProbeExchange
    from meshnet.vtep.tun import Tun
    from meshnet.vtep.underlay_socket import UnderlaySocket
    from meshnet.wire import Buffer

_BUFFER_BYTES = 65_536
_HALF_BYTES = 32_768
_CONTROL_BYTES = socket.CMSG_SPACE(4)
_SMALLEST = ENCAPSULATION_BYTES + 20
_CHECKED = (TCP, UDP)
_SMALLEST_TCP = _SMALLEST + 20
_COALESCED_BYTES = 256
"""Smaller packets are not worth holding: most are acknowledgements."""
_HEADER_START = ENCAPSULATION_BYTES - virtio.HEADER_BYTES
_SIZE = struct.Struct("i")
_V4 = struct.Struct(">BxH5xB2xI")


class _Space:
    """Room for what one read hands over."""

    __slots__ = ("buffers", "data", "joiner", "view")

    def __init__(self) -> None:
        self.data = bytearray(_BUFFER_BYTES)
        self.view = memoryview(self.data)
        self.buffers: list[Buffer] = [self.data]
        self.joiner = TrainJoiner(self.data)


class Receiver:
    """Carries packets from members to the TUN."""

    def __init__(
        self,
        tun: Tun,
        underlay: UnderlaySocket,
        table: PeerTable,
        counters: Counters,
        mtu_bytes: int,
        probes: ProbeExchange,
    ) -> None:
        self._probes = probes
        self._tun, self._socket, self._table, self._counters = tun, underlay.socket, table, counters
        self._mtu = mtu_bytes
        self._spare = [_Space(), _Space()]
        self._use(self._spare.pop())
        self._coalescer = Coalescer()
        # A super-packet whose payload is in a space of its own, and whose it is.
        self._waiting: tuple[TunnelPeer, list[Buffer], _Space] | None = None
        self._holding = False

    def _use(self, space: _Space) -> None:
        """Receive into this from now on."""
        self._space = space
        self._data, self._view, self._buffers = space.data, space.view, space.buffers

    def one(self) -> int:
        """What ``pump(1)`` does, straight on for the usual small packet (see `Sender.one`)."""
        try:
            got, controls, _, address = self._socket.recvmsg_into(
                self._buffers, _CONTROL_BYTES, socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return 0
        except OSError:
            self._counters.drop("rx_error")
            return 1
        if not controls:
            peer = self._table.by_underlay.get(address[0])
            if peer is not None and self._quick(peer, 0, got):
                peer.rx_calls += 1
                return 1
        self._carry(got, controls, address[0], hold=False)
        self._flush()  # a train that is not one packet is held in part
        return 1

    def _quick(self, peer: TunnelPeer, at: int, length: int) -> bool:
        """Write an IPv4 packet without options that needs no checksum looked at.

        Returns:
            False: it takes a closer look, and nothing was done.
        """
        data, start = self._data, at + ENCAPSULATION_BYTES
        header = peer.quick.get(bytes(self._view[at:start]))
        if header is None or length < _SMALLEST_TCP:
            return False
        first, size, protocol, source = _V4.unpack_from(data, start)
        if (
            first != 0x45
            or not 40 <= size <= length - ENCAPSULATION_BYTES
            or size > self._mtu
            or self._table.find(4, source) is not peer
            or ((protocol in _CHECKED) is (header is virtio.PLAIN))
        ):
            return False
        data[start - virtio.HEADER_BYTES : start] = header
        try:
            os.write(self._tun.fd, self._view[start - virtio.HEADER_BYTES : start + size])
        except OSError:
            peer.drop("tun_refused")
        peer.rx_packets += 1
        peer.rx_bytes += length
        return True

    def pump(self, budget: int) -> int:
        """Carry up to `budget` reads' worth; returns how many there were, fewer if no more wait."""
        receive = self._socket.recvmsg_into
        count = 0
        while count < budget:
            try:
                got, controls, _, address = receive(
                    self._buffers, _CONTROL_BYTES, socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                break
            except OSError:
                # An ICMP error for something sent before; it is the socket's no longer.
                self._counters.drop("rx_error")
                count += 1
                continue
            count += 1
            self._carry(got, controls, address[0], hold=budget > 1)
        self._flush()
        return count

    def carry_datagram(self, peer: TunnelPeer, datagram: bytes) -> None:
        """Carry a datagram that another received from a member."""
        self._data[: len(datagram)] = datagram
        self._datagram(peer, 0, len(datagram), hold=False)

    def _flush(self) -> None:
        """Write what is held."""
        if self._waiting is not None:
            peer, joined, space = self._waiting
            self._waiting = None
            self._write(peer, joined)
            self._spare.append(space)
        if self._holding:
            self._holding = False
            for buffers in self._coalescer.flush():
                self._write(None, buffers)

    def _carry(
        self, got: int, controls: list[tuple[int, int, bytes]], source: str, *, hold: bool
    ) -> None:
        """Carry what was received."""
        peer = self._table.by_underlay.get(source)
        size = (_SIZE.unpack_from(controls[0][2])[0] or got) if controls else got
        if peer is None:
            self._counters.drop("not_member", -(-got // size) if size else 1)
            return
        peer.rx_calls += 1
        if size < got:
            self._train(peer, size, got, hold=hold)
            return
        if self._waiting is not None:
            self._flush()
        self._datagram(peer, 0, got, hold=hold)

    def _train(self, peer: TunnelPeer, size: int, total: int, *, hold: bool) -> None:
        """Datagrams side by side."""
        front = peer.fronts.get(bytes(self._view[:ENCAPSULATION_BYTES]))
        joined = None
        if front is not None and self._source_is(peer, front[0], size):
            joined = self._space.joiner.join(size, total, unfinished=front[1], udp=self._tun.uso)
        if joined is None:
            self._flush()
            if self._super_packet(peer, front, size, total):
                return
            for at in range(0, total, size):
                self._datagram(peer, at, min(size, total - at), hold=True)
            return
        peer.rx_packets += len(joined) - 1
        peer.rx_bytes += total
        waiting = self._waiting
        if waiting is not None and waiting[0] is peer and extend(waiting[1], joined):
            self._flush()
            return
        self._flush()
        if hold and total > _HALF_BYTES:
            # The end of the same super-packet may be next.
            self._waiting = peer, joined, self._space
            self._use(self._spare.pop())
        else:
            self._write(peer, joined)

    def _super_packet(
        self, peer: TunnelPeer, front: tuple[int, bool] | None, size: int, total: int
    ) -> bool:
        """Carry one frame: a UDP super-packet of a kernel peer over a veth.

        ``UDP_GRO``'s size is then that of its datagrams.

        Returns:
            False: it is none, and nothing was done.
        """
        start = ENCAPSULATION_BYTES
        try:
            inner = Inner(self._data, start, total - start)
        except ValueError:
            return False
        if inner.protocol != UDP or inner.length + start != total:
            return False
        transport, room = inner.transport, inner.length - inner.transport
        field = start + transport + 6
        pseudo = inner.source + inner.destination + UDP + room
        if (
            front is None
            or not self._tun.uso
            or not self._source_is(peer, front[0], total)
            or room < 8
            or int.from_bytes(self._data[field : field + 2], "big") != partial(pseudo)
        ):
            self._datagram(peer, 0, total, hold=False)  # which says what is wrong with it
            return True
        peer.rx_packets += 1
        peer.rx_bytes += total
        virtio.pack_into(
            self._data, _HEADER_START, virtio.NEEDS_CSUM, virtio.GSO_UDP_L4, transport + 8, size,
            transport, 6,
        )  # fmt: skip
        self._write(peer, [self._view[_HEADER_START:total]])
        return True

    def _source_is(self, peer: TunnelPeer, version: int, size: int) -> bool:
        """Whether the first packet of a train has a source that is the member's."""
        start = ENCAPSULATION_BYTES + (12 if version == 4 else 8)
        end = start + (4 if version == 4 else 16)
        if end > size or self._data[ENCAPSULATION_BYTES] >> 4 != version:
            return False
        address = int.from_bytes(self._data[start:end], "big")
        return self._table.find(version, address) is peer

    def _datagram(self, peer: TunnelPeer, at: int, length: int, *, hold: bool) -> None:
        """One datagram at `at`."""
        if (
            hold
            and length < _COALESCED_BYTES
            and not self._holding
            and self._quick(peer, at, length)
        ):
            return
        data = self._data
        if length < _SMALLEST:
            peer.drop("malformed")
            return
        start = at + ENCAPSULATION_BYTES
        front = peer.fronts.get(bytes(self._view[at:start]))
        if front is None:
            front = self._parse(peer, at, length)
            if front is None:
                return
        version, unfinished = front
        try:
            inner = Inner(data, start, length - ENCAPSULATION_BYTES)
        except ValueError:
            peer.drop("malformed")
            return
        if inner.version != version:
            peer.drop("malformed")
            return
        if self._table.find(version, inner.source) is not peer:
            peer.drop("spoofed_source")
            return
        peer.rx_packets += 1
        peer.rx_bytes += length
        held = hold or self._holding
        if held and self._hold(peer, inner, start, unfinished=unfinished):
            return
        header = describe(inner, data, start, self._mtu, unfinished=unfinished)
        if header is None:
            peer.drop("rx_too_big")
            return
        begin = at + _HEADER_START
        data[begin:start] = header
        try:
            os.write(self._tun.fd, self._view[begin : start + inner.length])
        except OSError:
            peer.drop("tun_refused")

    def _hold(self, peer: TunnelPeer, inner: Inner, start: int, *, unfinished: bool) -> bool:
        """Give a segment to the coalescer; False: it is to go on as it is, now."""
        if inner.protocol != TCP or inner.length > self._mtu:
            return False
        packet = bytes(self._view[start : start + inner.length])
        ready = None
        if inner.length >= _COALESCED_BYTES:
            ready = self._coalescer.push(packet, inner, unfinished=unfinished)
            self._holding = True
        held = ready is not None
        if ready is None:
            ready = self._coalescer.flush_flow(packet, inner)
        for buffers in ready:
            self._write(peer, buffers)
        return held

    def _parse(self, peer: TunnelPeer, at: int, length: int) -> tuple[int, bool] | None:
        """An encapsulation that is not as the member's usually is.

        Returns:
            As `TunnelPeer.fronts`; None: dropped and counted, or a probe, and dealt with.
        """
        found = Encapsulation(self._data, at)
        own = self._table.own
        if not found.valid:
            peer.drop("bad_header")
        elif found.vni != own.vni:
            peer.drop("wrong_vni")
        elif found.destination != own.mac:
            peer.drop("not_our_mac")
        elif found.ethertype == ETHERTYPE_IPV4:
            return 4, found.remote_start is not None
        elif found.ethertype == ETHERTYPE_IPV6:
            return 6, found.remote_start is not None
        elif found.ethertype == probe.ETHERTYPE:
            self._probes.handle_udp(peer, self._view[at + ENCAPSULATION_BYTES : at + length])
        else:
            peer.drop("not_ip")
        return None

    def _write(self, peer: TunnelPeer | None, buffers: list[Buffer]) -> bool:
        try:
            os.writev(self._tun.fd, buffers)
        except OSError:
            if peer is not None:
                peer.drop("tun_refused")
            else:
                self._counters.drop("tun_refused")
            return False
        return True
