"""The userspace VTEP: datagrams from the underlay, and lines at its control socket."""

from __future__ import annotations

import json
import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from meshnet.vtep.control import Control
from meshnet.vtep.counters import Counters
from meshnet.vtep.peers import Own, PeerTable
from meshnet.vtep.probe_exchange import ProbeExchange
from meshnet.vtep.python.receiver import Receiver
from meshnet.vtep.tun import Tun
from meshnet.vtep.underlay_socket import UnderlaySocket
from meshnet.wire import probe, virtio, vxlan
from meshnet.wire.inner import UDP, Inner
from meshnet.wire.probe import REQUEST, Probe
from tests.hostile.campaign import Campaign, damage_bytes, damaged, pack, plain, unpack
from tests.unit.packets import MACS, VNI, tcp_packet, udp_packet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from random import Random

    from meshnet.vtep.peers import TunnelPeer
    from tests.hostile.campaign import Check

MTU = 1450
_MEMBERS = ("192.0.2.1", "192.0.2.2")
_STRANGER = "192.0.2.9"
_MOST_BYTES = 65_000
_MOST_PARTS = 128
"""Of a train (linux/udp.h, ``UDP_MAX_SEGMENTS``)."""
DOCUMENTS: list[dict[str, Any]] = [
    {"underlay_ip": ip, "mac": mac.hex(":"), "offload": True,
     "subnets": [f"10.42.{i + 1}.0/24", f"fd00:42:0:{i + 1}::/64"]}
    for i, (ip, mac) in enumerate(zip(_MEMBERS, reversed(MACS), strict=True))
]  # fmt: skip


def make_table() -> PeerTable:
    table = PeerTable(Own(VNI, MACS[0], 4789, 4))
    table.replace(DOCUMENTS)
    return table


# --- datagrams ----------------------------------------------------------------------------------


class _Socket:
    """Hands datagrams over, each with the size of a train's parts, and drops what is sent."""

    def __init__(self, waiting: list[tuple[bytes, int, str]]) -> None:
        self._waiting = waiting

    def recvmsg_into(self, buffers: list[bytearray], *_: int) -> tuple[int, list[Any], int, Any]:
        if not self._waiting:
            raise BlockingIOError
        data, size, source = self._waiting.pop(0)
        buffers[0][: len(data)] = data
        controls = [(17, 104, size.to_bytes(4, "little"))] if size else []
        return len(data), controls, 0, (source, 5)

    def sendto(self, data: bytes, *_: object) -> int:
        return len(data)


class _CountingExchange(ProbeExchange):
    """Counts what it is handed."""

    taken = 0

    def handle_udp(self, peer: TunnelPeer, payload: memoryview) -> None:
        self.taken += 1
        super().handle_udp(peer, payload)


def _datagram(random: Random) -> bytes:
    version, remote = random.choice((4, 6)), None
    payload = random.randbytes(random.choice((0, 1, 64, 300, 1300, 1390, 4000)))
    match random.randrange(8):
        case 0:
            inner = udp_packet(version, payload)
        case 1:
            unfinished = udp_packet(version, payload, unfinished=True)
            inner, remote = unfinished, (20 if version == 4 else 40, True)
        case 2:
            request = Probe(REQUEST, random.getrandbits(64), 1)
            frame = probe.pack(request, random.choice((1, 46, 1400)))
            return vxlan.pack(VNI, MACS[0], MACS[1], probe.ETHERTYPE, None) + frame
        case 3:
            inner = random.randbytes(random.choice((19, 20, 40, 60)))
        case _:
            inner = tcp_packet(version, payload, seq=random.choice((1000, 2300)))
    kind = vxlan.ETHERTYPE_IPV4 if version == 4 else vxlan.ETHERTYPE_IPV6
    return vxlan.pack(VNI, MACS[0], MACS[1], kind, remote) + inner


def _make_datagrams(random: Random) -> bytes:
    """Reads: budget, then for each a source, the size of its parts or 0, and its bytes."""
    parts = [bytes((random.choice((1, 2, 64)),))]
    for _ in range(random.randrange(1, 8)):
        data = _datagram(random)
        size = 0
        if random.randrange(3) == 0:
            size = len(data)
            more = [data[:-4] + random.randbytes(4) for _ in range(random.randrange(1, 40))]
            data = (data + b"".join(more))[:_MOST_BYTES]
            data = data[: len(data) - random.choice((0, 0, 1, size // 2))]
        if random.randrange(2):
            data = damage_bytes(random, data)[:_MOST_BYTES]
        if random.randrange(9) == 0:
            size = random.choice((1, 22, 50, len(data) + 1))
        if size:
            data = data[: size * _MOST_PARTS]
        source = random.choice((0, 0, 0, 0, 1))
        parts += [bytes((source,)) + size.to_bytes(4, "big") + data]
    return pack(*parts)


def _count_packets(written: bytes) -> int:
    """How many packets a write to the TUN is, each once carried by a datagram of its own."""
    _, kind, head, size, _, _ = virtio.unpack_from(written, 0)
    payload = len(written) - virtio.HEADER_BYTES - head
    # One that came larger than the MTU was a single datagram.
    return max(1, -(-payload // size)) if kind else 1


def _is_one_frame(content: bytes) -> bool:
    """Whether what UDP_GRO gave with a size is a UDP super-packet of a kernel peer over a veth."""
    try:
        inner = Inner(content, vxlan.ENCAPSULATION_BYTES, len(content) - vxlan.ENCAPSULATION_BYTES)
    except ValueError:
        return False
    return bool(inner.protocol == UDP and inner.length + vxlan.ENCAPSULATION_BYTES == len(content))


def check_datagrams(data: bytes, tun: socket.socket, inner: socket.socket) -> str:
    """Every datagram is written to the TUN, or counted as dropped, once; or is a probe."""
    (budget, *_), *reads = unpack(data) or [b"\1"]
    waiting = [
        (read[5:], int.from_bytes(read[1:5], "big"), (_MEMBERS[0], _STRANGER)[read[0] & 1])
        for read in reads
        if read[5:]
    ]
    table, counters = make_table(), Counters()
    wire = cast("Any", _Socket(waiting))
    underlay = UnderlaySocket(wire, "0.0.0.1", segmenting=True, trains=True)
    probes = _CountingExchange(wire, table, counters, None)
    receiver = Receiver(
        Tun(inner.fileno(), "tu0", uso=True), underlay, table, counters, MTU, probes
    )
    strangers = members = 0
    whole = True
    for content, size, source in list(waiting):
        count = max(1, -(-len(content) // size)) if size else 1
        if source != _STRANGER and _is_one_frame(content):
            whole = whole and count == 1  # its packets are told apart by its receiver
            count = 1
        strangers += count if source == _STRANGER else 0
        members += count if source != _STRANGER else 0
        whole = whole and (size or len(content)) <= MTU + vxlan.ENCAPSULATION_BYTES
    written = 0
    while waiting:
        if budget > 1:
            receiver.pump(budget)
        else:
            receiver.one()
        written += _drain(tun)
    drops = dict(table.by_underlay[_MEMBERS[0]].drops)
    accepted = table.by_underlay[_MEMBERS[0]].rx_packets
    late = sum(drops.pop(reason, 0) for reason in ("rx_too_big", "tun_refused"))
    drops.pop("bad_probe", 0)
    assert counters.drops.get("not_member", 0) == strangers
    assert accepted + sum(drops.values()) + probes.taken == members
    if whole:
        assert written == accepted - late, (written, accepted, late)
    return "delivered" if accepted else "dropped"


def _drain(tun: socket.socket) -> int:
    count = 0
    while True:
        try:
            count += _count_packets(tun.recv(70_000))
        except BlockingIOError:
            return count


@asynccontextmanager
async def _open_datagrams() -> AsyncIterator[Check]:
    tun, inner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with tun, inner:
        for end in (tun, inner):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)

        async def check(data: bytes) -> str:
            return check_datagrams(data, tun, inner)

        yield check


# --- control ------------------------------------------------------------------------------------

_REQUESTS: tuple[dict[str, Any], ...] = (
    {"v": 1, "op": "replace", "peers": DOCUMENTS},
    {"v": 1, "op": "update", "set": DOCUMENTS[:1], "remove": ["192.0.2.7"], "id": 5},
    {"v": 1, "op": "peers", "id": "x"},
    {"v": 1, "op": "counters"},
    {"v": 1, "op": "probe", "send": [[1, _MEMBERS[1], "udp", 1400]]},
    {"v": 1, "op": "status"},
)


def _make_line(random: Random) -> bytes:
    return damaged(random, random.choice(_REQUESTS)).replace(b"\n", b" ")


def check_line(line: bytes) -> str:
    """One line of JSON; if it is an error, nothing was changed."""
    table, counters = make_table(), Counters()
    changes: list[None] = []
    probes = ProbeExchange(cast("Any", _Socket([])), table, counters, None)
    control = Control(
        table,
        counters,
        {"pid": os.getpid()},
        probes,
        lambda: None,
        lambda: changes.append(None),
    )
    before = [peer.document for peer in table.by_underlay.values()]
    answer = control.answer(line)
    assert answer.endswith(b"\n")
    assert answer.count(b"\n") == 1
    document = json.loads(answer)
    if document["ok"]:
        return "done"
    assert [peer.document for peer in table.by_underlay.values()] == before
    assert not changes
    assert len(document["error"]) < 500
    return "refused"


DATAGRAMS = Campaign("datagrams", _make_datagrams, _open_datagrams, 400)
CONTROL = Campaign("control", _make_line, plain(check_line), 700)
