"""Probes on the wire: what the userspace VTEP sends, answers and accepts as an answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from meshnet.errors import UsageError
from meshnet.model import HostId, NetworkName
from meshnet.plan import fallen_peers
from meshnet.vtep.counters import Counters
from meshnet.vtep.peers import Own, PeerTable
from meshnet.vtep.probe_exchange import ProbeExchange
from meshnet.wire import probe
from meshnet.wire.probe import ANSWER, REQUEST, Probe
from meshnet.wire.vxlan import ENCAPSULATION_BYTES, Encapsulation
from tests.unit.mesh import open_mesh, until
from tests.values import IPV4, IPV6, make_network

if TYPE_CHECKING:
    from pathlib import Path

    from meshnet.model import Network, Vni

VNI, MAC, PEER_MAC, PEER_IP = 42, bytes.fromhex("026d0a2a0100"), "02:6d:0a:2a:02:00", "192.0.2.2"
PROD = NetworkName("prod")


class Sink:
    """A socket that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, tuple[str, int]]] = []

    def sendto(self, data: bytes, _flags: int, address: tuple[str, int]) -> None:
        self.sent.append((data, address))


class End:
    def __init__(self) -> None:
        self.wire, self.counters = Sink(), Counters()
        table = PeerTable(Own(VNI, MAC, 4789, 4))
        document = {"underlay_ip": PEER_IP, "mac": PEER_MAC, "subnets": ["10.42.2.0/24"]}
        table.replace([document | {"port": 24097}])
        self.peer = table.by_underlay[PEER_IP]
        self.probes = ProbeExchange(cast("Any", self.wire), table, self.counters, None)

    def receive_by_udp(self, payload: bytes) -> None:
        self.probes.handle_udp(self.peer, memoryview(payload))


@given(
    st.builds(
        Probe,
        st.sampled_from([REQUEST, ANSWER]),
        st.integers(0, (1 << 64) - 1),
        st.integers(0, (1 << 64) - 1),
    ),
    st.integers(0, 2000),
)
def test_a_probe_is_what_it_was(sent: Probe, size: int) -> None:
    payload = probe.pack(sent, size)
    assert probe.parse(payload) == sent
    assert len(payload) == max(size, probe.SHORTEST_BYTES)


def test_a_request_goes_to_the_members_port_and_to_nobody_else() -> None:
    end = End()
    end.probes.send([[7, PEER_IP, "udp", 1450], [8, "192.0.2.9", "udp", 0]])
    ((data, address),) = end.wire.sent
    assert address == (PEER_IP, 24097)
    front = Encapsulation(data)
    assert front.valid
    assert (front.vni, front.ethertype) == (VNI, probe.ETHERTYPE)
    assert front.destination == end.peer.mac
    assert len(data) == ENCAPSULATION_BYTES + 1450
    found = probe.parse(data[ENCAPSULATION_BYTES:])
    assert found is not None
    assert (found.kind, found.id) == (REQUEST, 7)


def test_a_request_is_answered_shortly_and_an_answer_is_kept() -> None:
    end = End()
    end.receive_by_udp(probe.pack(Probe(REQUEST, 7, 99), 1450))
    ((data, address),) = end.wire.sent
    assert address == (PEER_IP, 24097)
    assert probe.parse(data[ENCAPSULATION_BYTES:]) == Probe(ANSWER, 7, 99)
    assert len(data) == ENCAPSULATION_BYTES + probe.SHORTEST_BYTES
    assert end.probes.drain_answers() == []
    end.receive_by_udp(probe.pack(Probe(ANSWER, 8, time.monotonic_ns() - 5_000_000)))
    ((number, underlay_ip, ms),) = end.probes.drain_answers()
    assert (number, underlay_ip) == (8, PEER_IP)
    assert 5 <= ms < 1000
    assert end.probes.drain_answers() == []


@given(st.binary(max_size=80))
def test_anything_may_come(payload: bytes) -> None:
    end = End()
    end.receive_by_udp(payload)
    answered = probe.parse(payload) is not None
    assert end.peer.drops == ({} if answered else {"bad_probe": 1})


@pytest.mark.parametrize(
    "request_",
    [7, [], [7, PEER_IP, "udp"], [7, PEER_IP, "icmp", 0], ["7", PEER_IP, "udp", 0],
     [7, None, "udp", 0], [-1, PEER_IP, "udp", 0], [1 << 64, PEER_IP, "udp", 0],
     [7, PEER_IP, "vxlan", 70_000]],
)  # fmt: skip
def test_requests_that_are_malformed(request_: object) -> None:
    end = End()
    with pytest.raises(UsageError, match="probe"):
        end.probes.send([[7, PEER_IP, "udp", 0], request_])
    assert end.wire.sent == []


async def test_an_agent_starts_from_the_ways_that_its_kernel_has(
    tmp_path: Path, autojump_clock: object
) -> None:
    def build(vni: Vni) -> Network:
        return make_network("prod", (IPV4, IPV6), vni, fallback=True)

    async with open_mesh(tmp_path) as mesh:
        await mesh.registry.create_network(build, None)
        await mesh.start_many(3)
        await until(mesh.is_full, "every host reaches every other")
        node = mesh.nodes[0]
        before = node.essence()
        pair = (PROD, HostId("h2"))
        node.running.fallback.adopt([pair], trio.current_time())
        node.running.dirty.touch([HostId("h2")])
        await until(lambda: node.running.reconciler.in_sync, "the pass is over")
        moved = node.essence()
        assert moved != before
        assert fallen_peers(await mesh.snapshot(), moved) == {pair}
        await node.crash()
        await mesh.start(node)
        await until(lambda: node.running.reconciler.in_sync, "the first pass is over")
        assert node.running.fallback.fallen == {pair}
        assert node.essence() == moved
        assert node.running.reconciler.writes == 0
