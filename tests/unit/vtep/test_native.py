"""The native engine alone: its library, its table of members, and what it hands back."""

from __future__ import annotations

import contextlib
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnet.errors import KernelRefusedError, NotFoundError
from meshnet.vtep.native import library
from meshnet.wire import probe, vxlan
from meshnet.wire.probe import ANSWER, REQUEST, Probe
from tests.unit.ends import NativeEnds
from tests.unit.packets import MACS, VNI, prefix, tcp_packet, udp_packet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def ends() -> Iterator[NativeEnds]:
    with contextlib.closing(NativeEnds(host=2)) as made:
        yield made


def test_a_library_that_is_not_there_or_of_other_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "_LIBRARY", tmp_path / "made.so")
    with pytest.raises(NotFoundError, match=r"not built: run `make native`"):
        library.load()
    (tmp_path / "made.so").write_bytes(b"\x7fELF")
    with pytest.raises(NotFoundError, match=r"cannot be used .*`make native`"):
        library.load()
    assert library.build() == tmp_path / "made.so"
    assert [path.name for path in tmp_path.iterdir()] == ["made.so"]
    library.load()
    monkeypatch.setattr(library, "_digest", lambda: "of others")
    with pytest.raises(NotFoundError, match=r"another version: run `make native`"):
        library.load()


def test_no_compiler_or_one_that_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_LIBRARY", tmp_path / "made.so")
    monkeypatch.setenv("CC", "false")
    with pytest.raises(KernelRefusedError, match="does not compile"):
        library.build()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotFoundError, match="gcc"):
        library.build()
    assert not list(tmp_path.iterdir())


def _peer(i: int, subnet: str) -> dict[str, object]:
    return {
        "underlay_ip": f"127.1.0.{i + 1}",
        "mac": f"02:00:00:00:00:{i:02x}",
        "subnets": [subnet],
    }


@given(
    st.sampled_from([4, 6]),
    st.lists(st.tuples(st.integers(0, 255), st.sampled_from([0, 1, 6, 7, 8])), max_size=12),
    st.sampled_from([0, 24, 56, 57, 120]),
    st.integers(0, 255),
)
@settings(deadline=None)
def test_the_longest_prefix_wins(
    version: int, prefixes: list[tuple[int, int]], front: int, last: int
) -> None:
    """Of prefixes that differ in one byte, whose place is everywhere in an address."""
    bits = 32 if version == 4 else 128
    front = min(front, bits - 8)
    shift = bits - front - 8
    base = int(ip_address("10.66.66.66" if version == 4 else "fd00::77"))
    base &= ~(0xFF << shift) if front else 0
    networks = {
        ip_network(((base | byte << shift) >> (bits - front - n) << (bits - front - n), front + n))
        for byte, n in prefixes
    }
    documents = [_peer(i, str(network)) for i, network in enumerate(networks)]
    packet = bytearray(udp_packet(version, b"?"))
    address = base | last << shift
    at = 16 if version == 4 else 24
    packet[at : at + bits // 8] = address.to_bytes(bits // 8, "big")
    with contextlib.closing(NativeEnds()) as ends:
        table = ends.set_members(documents)
        ends.route(bytes(packet))
        ends.carry_out()
        ends.engine.collect()
        chosen = [peer for peer in table.by_underlay.values() if peer.tx_packets]
        expected = table.find(version, address)
        assert chosen == ([] if expected is None else [expected])


def test_a_probe_is_answered(ends: NativeEnds) -> None:
    """Handed back, and answered by the process's exchange of probes."""
    front = vxlan.pack(VNI, MACS[0], MACS[1], probe.ETHERTYPE, None)
    ends.hand(front + probe.pack(Probe(REQUEST, 7, 1), 1000))
    ends.carry_in()
    ((answer, _),) = ends.take_sent()
    assert answer[:20] == vxlan.pack(VNI, MACS[1], MACS[0], probe.ETHERTYPE, None)[:20]
    assert probe.parse(answer[22:]) == Probe(ANSWER, 7, 1)


@given(st.lists(st.binary(max_size=90), min_size=1, max_size=8), st.booleans(), st.integers(0, 3))
@settings(deadline=None)
def test_garbage_is_dropped_and_counted(
    ends: NativeEnds, parts: list[bytes], train: bool, kind: int
) -> None:
    """Whatever a member sends is carried, answered or counted, and disturbs nothing after it."""
    fronts = (b"", vxlan.pack(VNI, MACS[0], MACS[1], 0x0800, None),
              vxlan.pack(VNI, MACS[0], MACS[1], 0x86DD, (40, True)),
              prefix(4) + tcp_packet(4, b"")[:20])  # fmt: skip
    datagrams = [fronts[kind] + part for part in parts]
    before = ends.peer
    heard = before.rx_packets + sum(before.drops.values())
    if train:
        size = max(len(d) for d in datagrams) or 1
        ends.hand(b"".join(d.ljust(size, b"\0") for d in datagrams), size)
    else:
        for datagram in datagrams:
            ends.hand(datagram)
    valid = udp_packet(4, b"valid")
    ends.hand(prefix(4) + valid)
    ends.carry_in()
    assert ends.read()[-1] == valid
    after = ends.peer
    assert after.rx_packets + sum(after.drops.values()) >= heard + len(parts) + 1
