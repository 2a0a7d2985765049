"""The userspace VTEP by itself: its packets, its peers, its end and its beginning."""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import signal
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from meshnet.lab.poll import wait_until
from meshnet.vtep.engine import ENGINES
from meshnet.vtep.native import library
from meshnet.vtep.underlay_socket import SOL_UDP, UDP_SEGMENT
from meshnet.wire import vxlan
from tests.bench.common import scratch
from tests.netns.mesh import PingStream, ping
from tests.netns.vteps import HOSTS, MTU, PORT, VNI, Site, address, mac, transfer
from tests.unit.packets import ip_packet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.root
PAIRS = list(itertools.permutations(HOSTS, 2))
FUZZ = int(os.environ.get("MESHNET_FUZZ", "100000"))


both_engines = pytest.mark.parametrize("engine", ENGINES, indirect=True, scope="module")


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> str:
    """What carries packets: Python, unless a test is about packets, and so has to be of both."""
    chosen = str(getattr(request, "param", "python"))
    if chosen == "native":
        library.build()
    return chosen


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, engine: str) -> Iterator[Site]:
    with scratch() as spaces:
        made = Site(spaces, tmp_path_factory.mktemp("vtep"), engine)
        yield made
        for vtep in made.vteps.values():
            vtep.ask(op="quit")
            assert vtep.process.wait(timeout=10) == 0


@both_engines
@pytest.mark.parametrize("version", [4, 6])
def test_every_pair_pings(site: Site, version: int) -> None:
    for a, b in PAIRS:
        assert ping(site.container(a), address(b, version)), f"{a} to {b}"


@both_engines
@pytest.mark.parametrize("version", [4, 6])
def test_bulk_tcp_arrives_as_it_was_sent(site: Site, version: int) -> None:
    for a, b in PAIRS:
        transfer(site.container(a), site.container(b), address(b, version), 12_000_000)


@both_engines
@pytest.mark.parametrize("offload", [False, True])
def test_bulk_tcp_with_finished_checksums_and_without(site: Site, offload: bool) -> None:
    """Between two of these; towards a kernel device they are always finished."""
    one = site.vteps[1]
    one.ask(op="update", set=[site.peer(2, offload=offload)])
    before = one.counters(site.ip_of(2))
    transfer(site.container(1), site.container(2), address(2), 12_000_000)
    after = one.counters(site.ip_of(2))
    packets = after["tx_packets"] - before["tx_packets"]
    assert packets / (after["tx_calls"] - before["tx_calls"]) > 5
    assert not after["drops"]


@both_engines
@pytest.mark.parametrize(("version", "header"), [(4, 28), (6, 48)])
def test_the_largest_packet_passes(site: Site, version: int, header: int) -> None:
    for a, b in PAIRS:
        options = ("-M", "do", "-s", str(MTU - header))
        assert ping(site.container(a), address(b, version), *options), f"{a} to {b}"


@both_engines
@pytest.mark.parametrize("version", [4, 6])
def test_a_kernel_device_that_takes_unfinished_checksums(site: Site, version: int) -> None:
    """Made with ``remcsumrx``: Linux reads remote checksum offload as we do."""
    one = site.vteps[1]
    before = one.counters(site.ip_of(3))["drops"]
    one.ask(op="update", set=[site.peer(3, offload=True)])
    try:
        transfer(site.container(1), site.container(3), address(3, version), 12_000_000)
        with (
            site.socket_in("c3", address(3, version)) as receiver,
            site.socket_in("c1", address(1, version)) as sender,
        ):
            receiver.settimeout(5)
            for size in (1, 64, 1000):
                sender.sendto(bytes(size), receiver.getsockname())
                assert receiver.recv(65536) == bytes(size)
    finally:
        one.ask(op="update", set=[site.peer(3)])
    assert one.counters(site.ip_of(3))["drops"] == before


@both_engines
def test_an_underlay_link_without_offloads(site: Site) -> None:
    """Without checksum offload the kernel refuses UDP_SEGMENT, or segments by itself."""
    site.host(1).run(["ethtool", "-K", "eth0", "tx", "off", "gso", "off"])
    try:
        for version in (4, 6):
            for a, b in ((1, 2), (2, 1), (1, 3), (3, 1)):
                transfer(site.container(a), site.container(b), address(b, version), 2_000_000)
    finally:
        site.host(1).run(["ethtool", "-K", "eth0", "tx", "on", "gso", "on"])


@both_engines
def test_an_underlay_link_narrower_than_a_segment(site: Site) -> None:
    """Datagrams fragment outside, as those of a kernel VXLAN device do."""
    site.host(1).run(["ip", "link", "set", "eth0", "mtu", "1400"])
    try:
        for a, b in ((1, 2), (1, 3)):
            transfer(site.container(a), site.container(b), address(b), 2_000_000)
            with (
                site.socket_in(f"c{b}", address(b)) as receiver,
                site.socket_in(f"c{a}", address(a)) as sender,
            ):
                receiver.settimeout(5)
                for _ in range(3):
                    sender.sendto(bytes(MTU - 28), receiver.getsockname())
                    assert len(receiver.recv(65536)) == MTU - 28
    finally:
        site.host(1).run(["ip", "link", "set", "eth0", "mtu", "1500"])


@both_engines
def test_udp_of_all_sizes(site: Site) -> None:
    """Datagrams of a program, with UDP_SEGMENT and larger than the MTU, too."""
    for a, b in ((1, 2), (1, 3), (3, 1)):
        with (
            site.socket_in(f"c{b}", address(b)) as receiver,
            site.socket_in(f"c{a}", address(a)) as sender,
        ):
            receiver.settimeout(5)
            to = receiver.getsockname()
            for size in (1, 64, 1000, MTU - 28, 4000):
                data = bytes(i * 31 & 0xFF for i in range(size))
                for _ in range(10):
                    sender.sendto(data, to)
                assert [receiver.recv(65536) for _ in range(10)] == [data] * 10
            sender.setsockopt(SOL_UDP, UDP_SEGMENT, 500)
            sender.sendto(bytes(range(245)) * 20, to)
            parts = [receiver.recv(65536) for _ in range(10)]
            assert [len(part) for part in parts] == [500] * 9 + [400]
            assert b"".join(parts) == bytes(range(245)) * 20


@both_engines
def test_nobody_there_is_answered(site: Site) -> None:
    result = site.container(1).run(["ping", "-n", "-c1", "-W2", "10.48.77.2"], check=False)
    assert "Destination Host Unreachable" in result.stdout
    result = site.container(1).run(["ping", "-n", "-c1", "-W2", "fd00:48:0:77::2"], check=False)
    assert "unreachable" in result.stdout


def _frame(source: int, target: int, *, vni: int = VNI, to: bytes | None = None) -> bytes:
    """A datagram that host 3's VTEP could send, with an ICMP packet in it."""
    packet = bytearray(ip_packet(4, 1, b"\x00\x00" + bytes(20)))
    packet[12:20] = bytes((10, 48, source, 2, 10, 48, target, 2))
    front = vxlan.pack(vni, to or mac(target), mac(3), vxlan.ETHERTYPE_IPV4, None)
    return front + bytes(packet)


@both_engines
@pytest.mark.parametrize(
    ("reason", "datagram"),
    [
        ("wrong_vni", _frame(3, 1, vni=VNI + 1)),
        ("spoofed_source", _frame(2, 1)),
        ("spoofed_source", _frame(99, 1)),
        ("not_our_mac", _frame(3, 1, to=mac(2))),
        ("bad_header", b"\x00" + _frame(3, 1)[1:]),
        ("malformed", _frame(3, 1)[:30]),
        ("malformed", _frame(3, 1)[:-1]),
        ("not_ip", _frame(3, 1)[:20] + b"\x08\x06" + _frame(3, 1)[22:]),
    ],
)
def test_what_a_member_may_not_send(site: Site, reason: str, datagram: bytes) -> None:
    vtep = site.vteps[1]

    def dropped() -> int:
        found: int = vtep.counters(site.ip_of(3))["drops"].get(reason, 0)
        return found

    before = dropped()
    with site.socket_in("h3", site.ip_of(3)) as sender:
        for _ in range(5):
            sender.sendto(datagram, (site.ip_of(1), PORT))
        wait_until(lambda: dropped() == before + 5, 5, f"5 more dropped as {reason}")
        # A train of them.
        sender.setsockopt(SOL_UDP, UDP_SEGMENT, len(datagram))
        sender.sendto(datagram * 10, (site.ip_of(1), PORT))
        wait_until(lambda: dropped() == before + 15, 5, f"15 more dropped as {reason}")


@both_engines
def test_who_is_no_member_is_not_heard(site: Site) -> None:
    vtep = site.vteps[1]

    def dropped() -> int:
        found: int = vtep.ask(op="counters")["drops"].get("not_member", 0)
        return found

    before = dropped()
    with site.socket_in("x", site.ip_of(9)) as sender:
        for _ in range(5):
            sender.sendto(_frame(3, 1), (site.ip_of(1), PORT))
        wait_until(lambda: dropped() == before + 5, 5, "5 dropped")
    # A removed host is not a member any longer, until it is added again.
    assert ping(site.container(3), address(1))
    vtep.ask(op="update", remove=[site.ip_of(3)])
    assert not ping(site.container(3), address(1))
    vtep.ask(op="update", set=[site.peer(3)])
    assert ping(site.container(3), address(1))


@both_engines
def test_a_killed_process_is_followed_by_another(site: Site) -> None:
    vtep = site.vteps[1]
    routes = site.host(1).run(["ip", "-j", "route"]).stdout
    wait_until(lambda: len(json.loads((vtep.run_dir / "state.json").read_text())["peers"]) == 2,
               5, "members written down")  # fmt: skip
    stream = PingStream(site.container(1), address(2))
    assert ping(site.container(1), address(2))
    os.kill(vtep.process.pid, signal.SIGKILL)
    vtep.process.wait(timeout=5)
    assert [r["dst"] for r in json.loads(site.host(1).run(["ip", "-j", "route"]).stdout)] == [
        r["dst"] for r in json.loads(routes)
    ]
    vtep.start()
    # Nobody has told it of its peers.
    for version in (4, 6):
        assert ping(site.container(1), address(2, version))
        assert ping(site.container(3), address(1, version))
    assert site.host(1).run(["ip", "-j", "route"]).stdout == routes
    sent, lost = stream.stop()
    assert 0 < lost < min(sent, 1000)  # a ping a millisecond: less than a second


@both_engines
def test_it_ends_on_sigterm_and_the_device_stays(site: Site) -> None:
    vtep = site.vteps[2]
    os.kill(vtep.process.pid, signal.SIGTERM)
    assert vtep.process.wait(timeout=5) == 0
    assert not (vtep.run_dir / "control.sock").exists()
    site.host(2).run(["ip", "link", "show", "tu0"])
    vtep.start()
    assert ping(site.container(1), address(2))


def test_a_second_process_is_refused(site: Site) -> None:
    vtep = site.vteps[1]
    result = site.host(1).run(vtep.argv(), check=False)
    assert result.returncode == 5
    assert str(vtep.process.pid) in result.stderr
    elsewhere = [*vtep.argv()[:-1], str(vtep.run_dir.parent / "other")]
    result = site.host(1).run(elsewhere, check=False)
    assert result.returncode == 5
    assert "tu0" in result.stderr
    assert ping(site.container(1), address(2))


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (b"\xff\x00\n", "not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b"[]\n", "not a JSON object"),
        (b'{"v": 2, "op": "status"}\n', "version 2"),
        (b'{"v": 1}\n', "op None"),
        (b'{"v": 1, "op": "replace"}\n', "not a list"),
        (b'{"v": 1, "op": "replace", "peers": [7]}\n', "not an object"),
        (b'{"v": 1, "op": "update"}\n', "'set', 'remove' or both"),
    ],
)
def test_bad_requests_change_nothing(site: Site, request_: bytes, complaint: str) -> None:
    vtep = site.vteps[1]
    before = vtep.ask(op="peers")
    answer = vtep.ask_raw(request_)
    assert answer["ok"] is False
    assert complaint in answer["error"]
    assert vtep.ask(op="peers") == before


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"underlay_ip": "10.0.0.256"}, "10.0.0.256"),
        ({"underlay_ip": "fd00::1"}, "IPv4"),
        ({"underlay_ip": ["x"]}, "x"),
        ({"mac": "01:00:5e:00:00:01"}, "01:00:5e"),
        ({"mac": None}, "None"),
        ({"port": 0}, "0"),
        ({"port": True}, "True"),
        ({"subnets": []}, "subnets"),
        ({"subnets": ["10.48.3.1/24"]}, "10.48.3.1/24"),
        ({"subnets": ["10.48.3.0/33"]}, "10.48.3.0/33"),
        ({"subnets": ["10.48.2.0/24"]}, "given to peer"),
        ({"offload": 1}, "offload"),
        ({"color": 1}, "color"),
    ],
)
def test_bad_peers_change_nothing(site: Site, changes: dict[str, Any], complaint: str) -> None:
    vtep = site.vteps[1]
    before = vtep.ask(op="peers")
    request = {"v": 1, "op": "update", "set": [site.peer(3, **changes)], "id": 5}
    answer = vtep.ask_raw(json.dumps(request).encode() + b"\n")
    assert (answer["ok"], answer["id"]) == (False, 5)
    assert complaint in answer["error"]
    assert vtep.ask(op="peers") == before


def test_a_client_that_does_not_read_stops_nobody(site: Site) -> None:
    vtep = site.vteps[1]
    peers = [
        {"underlay_ip": f"10.9.{i >> 8}.{i & 255}", "mac": "02:00:00:00:00:01",
         "subnets": [f"10.49.{i >> 4 & 255}.{(i & 15) << 4}/28"]}
        for i in range(4000)
    ]  # fmt: skip
    vtep.ask(op="update", set=peers)
    with vtep.connect() as slow:
        slow.sendall(b'{"v": 1, "op": "counters"}\n' * 20)
        wait_until(lambda: bool(select.select([slow], [], [], 0)[0]), 5, "an answer begins")
        assert ping(site.container(1), address(2))
        vtep.ask(op="update", remove=[p["underlay_ip"] for p in peers])
        slow.settimeout(5)
        with slow.makefile("rb") as answers:
            for _ in range(20):
                assert json.loads(answers.readline())["ok"]
    assert vtep.ask(op="status")["peers"] == 2


def _mutations(rng: random.Random) -> Callable[[], bytes]:
    """Datagrams: nonsense, and packets of a member with some bytes wrong."""
    valid = [
        _frame(3, 1),
        _frame(3, 1)[:22] + ip_packet(4, 6, rng.randbytes(700)),
        _frame(3, 1)[:22] + ip_packet(4, 17, rng.randbytes(300)),
        vxlan.pack(VNI, mac(1), mac(3), vxlan.ETHERTYPE_IPV6, (40, False))
        + ip_packet(6, 6, rng.randbytes(900)),
        vxlan.pack(VNI, mac(1), mac(3), vxlan.ETHERTYPE_IPV4, (20, True))
        + ip_packet(4, 17, rng.randbytes(1200)),
    ]

    def make() -> bytes:
        if rng.random() < 0.2:
            return rng.randbytes(rng.randrange(0, 200))
        data = bytearray(rng.choice(valid))
        if rng.random() < 0.7 and data[22] >> 4 == 4:
            data[34:38] = bytes((10, 48, 3, 2))
        for _ in range(rng.randrange(0, 6)):
            data[rng.randrange(0, 90) % len(data)] = rng.randrange(256)
        return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)

    return make


@both_engines
def test_garbage_neither_kills_nor_fattens(site: Site) -> None:
    """`MESHNET_FUZZ` says how many datagrams."""
    vtep = site.vteps[1]
    rng = random.Random(1)
    made = [_mutations(rng)() for _ in range(5000)]
    to = (site.ip_of(1), PORT)
    with site.socket_in("h3", site.ip_of(3)) as sender:

        def send(count: int) -> None:
            for i in range(count // 10):
                data = made[rng.randrange(len(made))]
                if i % 4 == 0 and 0 < len(data) < 1400:
                    control = [(SOL_UDP, UDP_SEGMENT, struct.pack("H", len(data)))]
                    sender.sendmsg([data, *(made[-1 - k][: len(data)].ljust(len(data), b"\0")
                                            for k in range(9))], control, 0, to)  # fmt: skip
                else:
                    for k in range(10):
                        sender.sendto(made[(i * 7 + k) % len(made)], to)
                if i % 20 == 0:
                    assert vtep.process.poll() is None

        send(FUZZ // 4)
        vtep.ask(op="status")
        before = vtep.rss_kib()
        send(FUZZ - FUZZ // 4)
        vtep.ask(op="status")
        assert vtep.rss_kib() - before < 1024
    counted = vtep.counters(site.ip_of(3))
    heard = sum(counted["drops"].values()) + counted["rx_packets"]
    print(f"{heard} of {FUZZ} and what tests before sent were heard")
    # The rest found the socket's buffer full.
    assert heard > FUZZ // 20
    assert ping(site.container(3), address(1))
    transfer(site.container(2), site.container(1), address(1), 1_000_000)


@both_engines
def test_ipv6_underlay(tmp_path_factory: pytest.TempPathFactory, engine: str) -> None:
    with scratch() as spaces:
        # The kernel device leaves checksums unfinished, too.
        directory = tmp_path_factory.mktemp("vtep6")
        site = Site(spaces, directory, engine, family=6, vxlan="remcsumtx remcsumrx")
        for a, b in PAIRS:
            assert ping(site.container(a), address(b, 4))
            options = ("-M", "do", "-s", str(MTU - 48))
            assert ping(site.container(a), address(b, 6), *options)
        for a, b in ((1, 2), (1, 3), (3, 2)):
            transfer(site.container(a), site.container(b), address(b, 6), 4_000_000)


def test_start_is_quick_and_imports_little(site: Site) -> None:
    code = (
        "import sys, meshnet.vtep.main; "
        "print(sorted({'trio','pyroute2','msgspec','asyncio','ipaddress'} & set(sys.modules)))"
    )
    assert site.host(1).run(["python", "-c", code]).stdout.strip() == "[]"
    assert socket.CMSG_SPACE(4) == 24
