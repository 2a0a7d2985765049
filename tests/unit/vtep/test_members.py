"""The userspace VTEP's pure parts: members, look-ups, requests, ICMP answers, checksums."""

from __future__ import annotations

import functools
import json
import timeit
from ipaddress import ip_address, ip_network
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, IPv6

from meshnet.errors import ConflictError, UsageError
from meshnet.vtep.control import Control
from meshnet.vtep.counters import Counters
from meshnet.vtep.peers import Own, PeerTable, parse_subnet
from meshnet.vtep.probe_exchange import ProbeExchange
from meshnet.wire import icmp, vxlan
from meshnet.wire.checksum import finished, ones_sum
from tests.unit.packets import ip_packet, tcp_packet, udp_packet

MAC = bytes.fromhex("026d0a2a0100")


def table() -> PeerTable:
    return PeerTable(Own(42, MAC, 4789, 4))


def silent(made: PeerTable) -> ProbeExchange:
    return ProbeExchange(cast("Any", None), made, Counters(), None)


def make_control(made: PeerTable) -> Control:
    return Control(made, Counters(), {"pid": 1}, silent(made), lambda: None, lambda: None)


def peer(i: int, *subnets: str, **changes: object) -> dict[str, Any]:
    return {
        "underlay_ip": f"192.0.{i >> 8}.{i & 255}",
        "mac": f"02:00:00:00:{i >> 8:02x}:{i & 255:02x}",
        "subnets": list(subnets) or [f"10.{i >> 8}.{i & 255}.0/24"],
        **changes,
    }


@given(st.binary(max_size=4000))
def test_ones_sum_is_the_sum_of_words(data: bytes) -> None:
    padded = data + b"\0" * (len(data) % 2)
    total = sum(padded[i] << 8 | padded[i + 1] for i in range(0, len(padded), 2))
    assert ones_sum(data) == total % 0xFFFF
    assert ones_sum(memoryview(data)) == total % 0xFFFF
    assert (ones_sum(padded) + finished(ones_sum(padded))) % 0xFFFF == 0


@given(
    st.lists(st.tuples(st.integers(0, (1 << 32) - 1), st.integers(0, 32)), max_size=20),
    st.integers(0, (1 << 32) - 1),
)
def test_the_longest_prefix_wins(prefixes: list[tuple[int, int]], address: int) -> None:
    networks = {ip_network((number >> (32 - n) << (32 - n), n)) for number, n in prefixes}
    made = table()
    made.replace(peer(i, str(network)) for i, network in enumerate(networks))
    found = made.find(4, address)
    best = max(
        (n for n in networks if ip_address(address) in n), key=lambda n: n.prefixlen, default=None
    )
    assert (found.document["subnets"][0] if found else None) == (str(best) if best else None)


def test_a_lookup_costs_the_same_with_10_and_10_000_peers() -> None:
    times = []
    for count in (10, 10_000):
        made = table()
        made.replace(peer(i) for i in range(count))
        address = int(ip_address("10.0.5.7"))
        assert made.find(4, address) is made.by_underlay["192.0.0.5"]
        find = functools.partial(made.find, 4, address)
        times.append(min(timeit.repeat(find, number=2000, repeat=9)))
    assert times[1] < times[0] * 3


def test_what_is_sent_to_whom() -> None:
    made = table()
    made.replace([peer(1, "10.0.1.0/24", "fd00::/64", port=5), peer(2, offload=True)])
    kernel, same = made.by_underlay["192.0.0.1"], made.by_underlay["192.0.0.2"]
    assert (kernel.address, same.address) == (("192.0.0.1", 5), ("192.0.0.2", 4789))
    plain = vxlan.Encapsulation(kernel.prefixes[4, 6])
    assert (plain.vni, plain.destination, plain.source) == (42, kernel.mac, MAC)
    assert (plain.ethertype, plain.remote_start, plain.valid) == (0x0800, None, True)
    for version, start in ((4, 20), (6, 40)):
        for protocol in (6, 17):
            remote = vxlan.Encapsulation(same.prefixes[version, protocol])
            assert (remote.remote_start, remote.remote_udp) == (start, protocol == 17)
            assert remote.valid
    # What it sends is understood whether or not it takes unfinished checksums itself.
    assert set(kernel.fronts.values()) == {(4, False), (4, True), (6, False), (6, True)}


def test_changes_are_whole_and_counters_go_on() -> None:
    made = table()
    made.replace([peer(1), peer(2)])
    made.by_underlay["192.0.0.1"].tx_packets = 7
    before = dict(made.by_underlay)
    with pytest.raises(ConflictError, match=r"192\.0\.0\.2"):
        made.update([peer(3), peer(1, "10.0.2.0/24")], [])
    with pytest.raises(UsageError):
        made.replace([peer(3), {}])
    with pytest.raises(ConflictError, match="twice"):
        made.replace([peer(3), peer(3)])
    assert made.by_underlay == before
    # A subnet moves from one to another in one step.
    made.update([peer(1, "10.0.2.0/24")], ["192.0.0.2", "192.0.0.77"])
    assert list(made.by_underlay) == ["192.0.0.1"]
    assert made.by_underlay["192.0.0.1"].tx_packets == 7
    assert made.find(4, int(ip_address("10.0.1.1"))) is None


@given(st.text(max_size=30))
def test_a_subnet_is_one_or_a_usage_error(text: str) -> None:
    try:
        version, number, length = parse_subnet(text, "test")
    except UsageError:
        return
    assert ip_network((number, length)).version == version or version == 6


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@given(
    st.sampled_from(["replace", "update", "peers", "counters", "status"]),
    st.dictionaries(st.sampled_from(["peers", "set", "remove", "id"]), json_values),
    json_values,
    st.sampled_from(["underlay_ip", "mac", "subnets", "port", "offload"]),
)
def test_any_request_is_answered(
    op: str, request_: dict[str, Any], value: object, key: str
) -> None:
    made = table()
    control = make_control(made)
    answer = json.loads(control.answer(json.dumps({"v": 1, "op": op, **request_}).encode()))
    assert answer["v"] == 1
    assert answer["ok"] or answer["error"]
    wrong = {"v": 1, "op": "replace", "peers": [peer(1, **{key: value})]}
    answer = json.loads(control.answer(json.dumps(wrong).encode()))
    assert answer["ok"] or answer["error"]


@given(st.binary(max_size=200))
def test_any_line_is_answered(line: bytes) -> None:
    control = make_control(table())
    assert json.loads(control.answer(line))["ok"] is False
    assert not control.quitting


def test_icmp_answers() -> None:
    packet = udp_packet(4, bytes(1400))
    for made, code in ((icmp.unreachable(packet), 1), (icmp.too_big(packet, 1300), 4)):
        assert made is not None
        answer = IP(made)
        assert (answer.src, answer.dst) == ("10.42.2.3", "10.42.1.2")
        assert (answer[ICMP].type, answer[ICMP].code) == (3, code)
        if code == 4:
            assert answer[ICMP].nexthopmtu == 1300
        assert made[28:] == packet[: len(made) - 28]
        assert len(made) <= 576
        del answer.chksum, answer[ICMP].chksum, answer.len
        assert bytes(answer) == made
    packet = tcp_packet(6, bytes(1400))
    made, big = icmp.unreachable(packet), icmp.too_big(packet, 1280)
    assert made is not None
    assert big is not None
    answer6 = IPv6(made)
    assert (answer6[ICMPv6DestUnreach].type, answer6[ICMPv6DestUnreach].code) == (1, 0)
    assert IPv6(big)[ICMPv6PacketTooBig].mtu == 1280
    assert (answer6.src, len(made)) == (IPv6(packet).dst, 1280)
    del answer6[ICMPv6DestUnreach].cksum
    assert bytes(answer6) == made


def test_no_icmp_answer_to_errors_groups_and_fragments() -> None:
    errors = [ip_packet(4, 1, bytes((kind, 0)) + bytes(30)) for kind in (3, 11, 12)]
    group, later, broken = (bytearray(udp_packet(4, bytes(50))) for _ in range(3))
    group[16:20] = bytes((224, 0, 0, 1))
    later[7] = 5
    broken[12:16] = bytes(4)
    for refused in (*errors, bytes(group), bytes(later), bytes(broken)):
        assert icmp.unreachable(refused) is None
    group6 = bytearray(udp_packet(6, bytes(50)))
    group6[24] = 0xFF
    assert icmp.unreachable(group6) is None
    assert icmp.unreachable(ip_packet(6, 58, bytes((1, 0)) + bytes(30))) is None
    assert icmp.unreachable(ip_packet(6, 58, bytes((128, 0)) + bytes(30))) is not None


@given(st.binary(min_size=1, max_size=80))
def test_icmp_of_garbage(data: bytes) -> None:
    icmp.unreachable(data)
    icmp.too_big(data, 1280)
