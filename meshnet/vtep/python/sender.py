"""Outward: from the TUN to the underlay.

::

    one slot of the buffer      ┌──────────── 22 ────────────┐
                          ......│.. 12 ..│ virtio header (10)│ IP packet …
                                ▲        ▲ read to here
                                └ the encapsulation is written over both: the datagram is complete
                                  where it was read, and is sent from there

A super-packet is cut (`meshnet.wire.segment`) and sent at once.  Small packets are read into one
slot after another, and neighbours of one size to one peer leave by one ``UDP_SEGMENT`` send, as far
as more of them are waiting already: nothing is held back for what may come.

The buffer belongs to this object; nothing refers to it after `pump` returns.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from typing import TYPE_CHECKING

from meshnet.vtep.underlay_socket import SOL_UDP, UDP_SEGMENT, connect_underlay
from meshnet.wire import icmp, virtio
from meshnet.wire.segment import MAX_PACKET_BYTES, MAX_SEGMENTS, MAX_SEND_BYTES, Cutter, complete
from meshnet.wire.vxlan import ENCAPSULATION_BYTES

if TYPE_CHECKING:
    import socket

    from meshnet.vtep.counters import Counters
    from meshnet.vtep.peers import PeerTable, TunnelPeer
    from meshnet.vtep.tun import Tun
    from meshnet.vtep.underlay_socket import UnderlaySocket
    from meshnet.wire import Buffer

_SLOTS = 64
_FRONT = ENCAPSULATION_BYTES - virtio.HEADER_BYTES
_VIRTIO = virtio.unpack_from
_V4_DESTINATION = struct.Struct(">16xI")
_V6_DESTINATION = struct.Struct(">24xQQ")
_ANSWERS_PER_S = 100
_MOST_CONNECTED = 128
# What a card without checksum offload, or a link narrower than a segment, says to UDP_SEGMENT.
_NOT_SEGMENTED = frozenset({errno.EIO, errno.EINVAL, errno.EMSGSIZE})


class Sender:
    """Carries packets from the TUN to peers."""

    def __init__(
        self,
        tun: Tun,
        underlay: UnderlaySocket,
        table: PeerTable,
        counters: Counters,
        mtu_bytes: int,
    ) -> None:
        self._tun, self._socket, self._table, self._counters = tun, underlay.socket, table, counters
        self._segmenting, self._local = underlay.segmenting, underlay.local
        self._connected: dict[tuple[str, int], socket.socket] = {}
        self._mtu = mtu_bytes
        self._most_read = virtio.HEADER_BYTES + mtu_bytes
        step = (mtu_bytes + ENCAPSULATION_BYTES + 63) & ~63
        self._step = step
        self._data = bytearray(_SLOTS * step + ENCAPSULATION_BYTES + MAX_PACKET_BYTES)
        self._view = view = memoryview(self._data)
        most = virtio.HEADER_BYTES + MAX_PACKET_BYTES
        self._slots = [[view[i * step + _FRONT : i * step + _FRONT + most]] for i in range(_SLOTS)]
        self._cutters: dict[int, Cutter] = {}
        self._controls: dict[int, list[tuple[int, int, bytes]]] = {}
        # Datagrams of one size, but for the last, that wait to be sent to one peer.
        self._run: list[Buffer] = []
        self._run_peer: TunnelPeer | None = None
        self._run_size = self._run_most = 0
        self._answers, self._answers_since = 0, 0.0

    def one(self) -> int:
        """What ``pump(1)`` does, straight on for the usual small packet.

        A lone packet finds the processor's caches cold: every function and object less counts.
        """
        try:
            got = os.readv(self._tun.fd, self._slots[0])
        except BlockingIOError:
            return 0
        peer = self._quick(0, got)
        if peer is None:
            self._carry(0, got)
            self._flush()
        elif peer.tx_socket is None:
            self._send(peer, [self._view[: got + _FRONT]], 0, 1)
        else:
            try:
                # Not socket.send: the code of this is warm, the TUN's other direction has it too.
                sent = os.write(peer.tx_fd, self._view[: got + _FRONT])
            except OSError:
                self._send(peer, [self._view[: got + _FRONT]], 0, 1)
                return 1
            peer.tx_calls += 1
            peer.tx_packets += 1
            peer.tx_bytes += sent
        return 1

    def _quick(self, slot: int, got: int) -> TunnelPeer | None:
        """Make a datagram of an IPv4 packet without options that is not a super-packet.

        Returns:
            Whom it is for; None: it takes a closer look, and nothing was changed.
        """
        data, start = self._data, slot * self._step + ENCAPSULATION_BYTES
        flags, kind, _, _, begin, offset = _VIRTIO(data, start - virtio.HEADER_BYTES)
        if kind or data[start] != 0x45 or got > self._most_read:
            return None
        peer = self._table.find(4, _V4_DESTINATION.unpack_from(data, start)[0])
        if peer is None:
            return None
        if not flags:
            prefix = peer.prefixes[4, 0]
        elif begin != 20 or not peer.offload:
            return None
        else:
            prefix = peer.prefixes[4, 6 if offset == 16 else 17]
        data[start - ENCAPSULATION_BYTES : start] = prefix
        return peer

    def pump(self, budget: int) -> int:
        """Carry up to `budget` reads' worth; returns how many there were, fewer if no more wait.

        Raises:
            OSError: the TUN is gone.
        """
        fd, read, slots, step = self._tun.fd, os.readv, self._slots, self._step
        quick, view, run = self._quick, self._view, self._run
        slot = 0
        for count in range(budget):
            try:
                got = read(fd, slots[slot])
            except BlockingIOError:
                self._flush()
                return count
            peer = quick(slot, got)
            if peer is None:
                slot = self._carry(slot, got)
            elif (
                run
                and got + _FRONT == self._run_size == len(run[-1])
                and (peer is self._run_peer and len(run) < self._run_most)
            ):
                # As `_append` does, without the call: this is every packet of a flood.
                front = slot * step
                run.append(view[front : front + got + _FRONT])
                slot += 1
            else:
                slot = self._append(peer, slot, got + _FRONT)
            if slot == _SLOTS:
                self._flush()
                slot = 0
        self._flush()
        return budget

    def carry_read(self, read: bytes) -> None:
        """Carry what another read from the TUN: a virtio header and a packet."""
        self._slots[0][0][: len(read)] = read
        self._carry(0, len(read))
        self._flush()

    def _carry(self, slot: int, got: int) -> int:
        """Carry what was read into a slot; returns the slot to read into next."""
        data, start = self._data, slot * self._step + ENCAPSULATION_BYTES
        length = got - virtio.HEADER_BYTES
        version = data[start] >> 4
        if version == 4 and length >= 20:
            (destination,) = _V4_DESTINATION.unpack_from(data, start)
        elif version == 6 and length >= 40:
            high, low = _V6_DESTINATION.unpack_from(data, start)
            destination = high << 64 | low
        else:
            self._counters.drop("malformed")
            return slot
        peer = self._table.find(version, destination)
        if peer is None:
            self._no_peer(start, length)
            return slot
        if data[start - virtio.HEADER_BYTES + 1]:  # the GSO type
            self._flush()
            self._super_packet(peer, version, slot, length)
            return 0
        if not self._complete(peer, version, start, length):
            return slot
        return self._append(peer, slot, length + ENCAPSULATION_BYTES)

    def _complete(self, peer: TunnelPeer, version: int, start: int, length: int) -> bool:
        """Make a datagram of a packet where it stands; False: it is too large."""
        data = self._data
        if length > self._mtu:
            self._too_big(start, length)
            return False
        protocol = 0
        if data[start - virtio.HEADER_BYTES] & virtio.NEEDS_CSUM:
            _, _, _, _, begin, offset = _VIRTIO(data, start - virtio.HEADER_BYTES)
            if peer.offload and begin == (20 if version == 4 else 40) and offset in (6, 16):
                protocol = 6 if offset == 16 else 17
            elif begin + offset + 2 <= length:
                complete(self._view[start : start + length], begin, offset)
        data[start - ENCAPSULATION_BYTES : start] = peer.prefixes[version, protocol]
        return True

    def _append(self, peer: TunnelPeer, slot: int, size: int) -> int:
        """Add the datagram in a slot to the run; returns the next slot, maybe one too many."""
        run = self._run
        if run and (
            peer is not self._run_peer
            or size > self._run_size
            or len(run[-1]) != self._run_size
            or len(run) >= self._run_most
        ):
            self._flush()
        if not run:
            self._run_peer, self._run_size = peer, size
            self._run_most = min(MAX_SEGMENTS, MAX_SEND_BYTES // size)
        front = slot * self._step
        run.append(self._view[front : front + size])
        return slot + 1

    def _flush(self) -> None:
        """Send the run; after that no slot is taken."""
        run, peer = self._run, self._run_peer
        if run and peer is not None:
            self._send(peer, run, self._run_size if len(run) > 1 else 0, len(run))
            run.clear()

    def _super_packet(self, peer: TunnelPeer, version: int, slot: int, length: int) -> None:
        cutter = self._cutters.get(slot)
        if cutter is None:
            start = slot * self._step + ENCAPSULATION_BYTES
            cutter = self._cutters[slot] = Cutter(self._data, start)
        header = virtio.unpack_from(self._data, slot * self._step + _FRONT)
        udp = header[1] == virtio.GSO_UDP_L4
        remote = peer.offload and header[4] == (20 if version == 4 else 40)
        prefix = peer.prefixes[version, (17 if udp else 6) if remote else 0]
        try:
            sends = cutter.cut(length, header, prefix, remote=remote)
        except ValueError:
            self._counters.drop("malformed")
            return
        for buffers, size in sends:
            self._send(peer, buffers, size, len(buffers) >> 1)

    def _send(self, peer: TunnelPeer, buffers: list[Buffer], size: int, packets: int) -> None:
        """One send; where the kernel does not segment, one for each datagram."""
        if size == 0:
            controls = []
        elif not self._segmenting:
            self._send_each(peer, buffers, size)
            return
        else:
            found = self._controls.get(size)
            if found is None:
                found = [(SOL_UDP, UDP_SEGMENT, struct.pack("H", size))]
                self._controls[size] = found
            controls = found
        try:
            if peer.tx_socket is not None or self._connect(peer):
                sent = self._send_connected(peer, buffers, controls)
            else:
                sent = self._socket.sendmsg(buffers, controls, 0, peer.address)
        except OSError as error:
            if size and error.errno in _NOT_SEGMENTED:
                self._send_each(peer, buffers, size)
            else:
                self.refused(peer, error.errno or 0, packets)
            return
        peer.tx_calls += 1
        peer.tx_packets += packets
        peer.tx_bytes += sent

    def socket_of(self, peer: TunnelPeer, *, make: bool = False) -> int:
        """The descriptor of the peer's own socket, for who sends by it himself; -1: it has none.

        Args:
            make: give it one, as long as there are few.
        """
        known = peer.tx_socket is not None or peer.address in self._connected
        return peer.tx_fd if (known or make) and self._connect(peer) else -1

    def _connect(self, peer: TunnelPeer) -> bool:
        """Give a peer a socket of its own, as long as there are few."""
        made = self._connected.get(peer.address)
        if made is None:
            if len(self._connected) >= _MOST_CONNECTED:
                return False
            try:
                made = connect_underlay(self._local, peer.address)
            except OSError:
                return False  # the send itself will say why
            self._connected[peer.address] = made
        peer.tx_socket, peer.tx_fd = made, made.fileno()
        return True

    @staticmethod
    def _send_connected(
        peer: TunnelPeer, buffers: list[Buffer], controls: list[tuple[int, int, bytes]]
    ) -> int:
        made = peer.tx_socket
        assert made is not None
        try:
            return made.sendmsg(buffers, controls)
        except ConnectionRefusedError:
            # ICMP's answer to an earlier one: its VTEP was not there then.
            return made.sendmsg(buffers, controls)

    def forget_sockets(self) -> None:
        """Close the sockets of those that are not members any more."""
        addresses = {peer.address for peer in self._table.by_underlay.values()}
        for address in self._connected.keys() - addresses:
            self._connected.pop(address).close()

    def close(self) -> None:
        """Close the sockets of all peers."""
        for made in self._connected.values():
            made.close()
        self._connected.clear()

    def _send_each(self, peer: TunnelPeer, buffers: list[Buffer], size: int) -> None:
        whole = memoryview(b"".join(buffers))
        for at in range(0, len(whole), size):
            self._send(peer, [whole[at : at + size]], 0, 1)

    @staticmethod
    def refused(peer: TunnelPeer, number: int, packets: int) -> None:
        """Count packets that the underlay did not take, by errno."""
        if number == errno.EAGAIN:
            peer.drop("tx_congested", packets)
        elif number == errno.EMSGSIZE:
            peer.drop("tx_too_big", packets)
        else:
            peer.drop(f"tx_{errno.errorcode.get(number, 'error')}", packets)

    def _no_peer(self, start: int, length: int) -> None:
        self._counters.drop("no_peer")
        if self._may_answer():
            self._answer(icmp.unreachable(self._view[start : start + length]))

    def _too_big(self, start: int, length: int) -> None:
        """Larger than the device's MTU: it had another one a moment ago."""
        self._counters.drop("tx_too_big")
        packet = self._view[start : start + length]
        if (packet[0] >> 4 == 6 or packet[6] & 0x40) and self._may_answer():
            self._answer(icmp.too_big(packet, self._mtu))

    def _answer(self, packet: bytes | None) -> None:
        if packet is not None:
            try:
                os.write(self._tun.fd, virtio.PLAIN + packet)
            except OSError:
                self._counters.drop("tun_refused")

    def _may_answer(self) -> bool:
        """Whether an ICMP answer is within the limit (RFC 1812 §4.3.2.8, RFC 4443 §2.4 (f))."""
        now = time.monotonic()
        if now - self._answers_since >= 1.0:
            self._answers, self._answers_since = 0, now
        self._answers += 1
        return self._answers <= _ANSWERS_PER_S
