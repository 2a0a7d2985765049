"""Probes: sent when the agent asks for them, answered without it.

The process answers, and not the agent, because the tunnels that are probed outlive the agent.

::

    by "udp"    our UDP port ═ VXLAN's encapsulation ═ the member's UDP port
    by "vxlan"  packet socket ─ the kernel's VXLAN device ═══ the member's ─ packet socket

A request is answered by the tunnel that it came by, if it came from a member.  Whatever else comes
is dropped and counted.  There is one answer to a request, no longer than it: nothing is amplified.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from meshnet.errors import UsageError
from meshnet.wire import probe, vxlan
from meshnet.wire.probe import ANSWER, REQUEST, Probe

if TYPE_CHECKING:
    from collections.abc import Callable

    from meshnet.vtep.counters import Counters
    from meshnet.vtep.peers import PeerTable, TunnelPeer

_MOST_ANSWERS = 4096
_MOST_READS = 64
_MOST_BYTES = 65_535


class ProbeExchange:
    """Sends probes, answers members', and keeps answers until they are asked for.

    Args:
        underlay: the UDP socket; the caller owns it.
        dev: name of the kernel's VXLAN device of the network, which need not exist (yet); None:
            there is no such tunnel.
    """

    def __init__(
        self, underlay: socket.socket, table: PeerTable, counters: Counters, dev: str | None
    ) -> None:
        self._underlay, self._table, self._counters, self._dev = underlay, table, counters, dev
        self._answers: deque[tuple[int, str, float]] = deque(maxlen=_MOST_ANSWERS)
        self._known: dict[str, TunnelPeer] | None = None
        self._by_mac: dict[bytes, TunnelPeer] = {}
        self.packet_socket: socket.socket | None = None
        if dev is not None:
            # Bound to no device: it may be made later, or made anew.
            with contextlib.suppress(OSError):
                self.packet_socket = socket.socket(
                    socket.AF_PACKET,
                    socket.SOCK_DGRAM | socket.SOCK_NONBLOCK,
                    socket.htons(probe.ETHERTYPE),
                )

    def close(self) -> None:
        """Close what is its own."""
        if self.packet_socket is not None:
            self.packet_socket.close()

    def send(self, requests: list[Any]) -> None:
        """Send probes, each ``[id, underlay_ip, "udp" or "vxlan", bytes]``; none to non-members.

        Raises:
            UsageError: one of them is malformed; none was sent.
        """
        checked = [_check(request) for request in requests]
        for number, underlay_ip, tunnel, size in checked:
            peer = self._table.by_underlay.get(underlay_ip)
            if peer is not None:
                payload = probe.pack(Probe(REQUEST, number, time.monotonic_ns()), size)
                (self._by_udp if tunnel == "udp" else self._by_vxlan)(peer, payload)

    def drain_answers(self) -> list[tuple[int, str, float]]:
        """The answers that came since: id, who answered, milliseconds."""
        found = list(self._answers)
        self._answers.clear()
        return found

    def handle_udp(self, peer: TunnelPeer, payload: memoryview) -> None:
        """A member's probe came by UDP."""
        self._handle(peer, payload, self._by_udp)

    def _handle(
        self,
        peer: TunnelPeer,
        payload: memoryview | bytes,
        send: Callable[[TunnelPeer, bytes], None],
    ) -> None:
        """Note an answer; answer a request by the tunnel that it came by."""
        found = probe.parse(payload)
        if found is None:
            peer.drop("bad_probe")
        elif found.kind == REQUEST:
            send(peer, probe.pack(found._replace(kind=ANSWER)))
        else:
            self._note(peer, found)

    def receive(self) -> None:
        """Read what waits at the packet socket."""
        if self.packet_socket is None:
            return
        for _ in range(_MOST_READS):
            try:
                payload, (dev, _, _, _, mac) = self.packet_socket.recvfrom(_MOST_BYTES)
            except BlockingIOError:
                return
            except OSError:
                continue  # the device went
            if dev != self._dev:
                continue
            peer = self._peer_of(mac)
            if peer is None:
                self._counters.drop("not_member")
                continue
            self._handle(peer, payload, self._by_vxlan)

    def _peer_of(self, mac: bytes) -> TunnelPeer | None:
        if self._known is not self._table.by_underlay:  # another table after every change
            self._known = self._table.by_underlay
            self._by_mac = {peer.mac: peer for peer in self._known.values()}
        return self._by_mac.get(mac)

    def _note(self, peer: TunnelPeer, answer: Probe) -> None:
        ms = (time.monotonic_ns() - answer.sent_ns) / 1e6
        self._answers.append((answer.id, peer.underlay_ip, round(ms, 3)))

    def _by_udp(self, peer: TunnelPeer, payload: bytes) -> None:
        own = self._table.own
        front = vxlan.pack(own.vni, peer.mac, own.mac, probe.ETHERTYPE, None)
        try:
            self._underlay.sendto(front + payload, socket.MSG_DONTWAIT, peer.address)
        except OSError:
            peer.drop("probe_not_sent")

    def _by_vxlan(self, peer: TunnelPeer, payload: bytes) -> None:
        if self.packet_socket is None or self._dev is None:
            return
        try:
            self.packet_socket.sendto(payload, (self._dev, probe.ETHERTYPE, 0, 0, peer.mac))
        except OSError:
            peer.drop("probe_not_sent")


def _check(request: Any) -> tuple[int, str, str, int]:  # noqa: ANN401
    match request:
        case [int(number), str(underlay_ip), ("udp" | "vxlan") as tunnel, int(size)] if (
            0 <= number < 1 << 64 and 0 <= size <= _MOST_BYTES
        ):
            return number, underlay_ip, tunnel, size
    raise UsageError(f"probe: {request!r:.80} is not [id, underlay_ip, 'udp' or 'vxlan', bytes]")
