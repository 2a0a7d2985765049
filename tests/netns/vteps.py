"""Three hosts of one network, made by hand: two userspace VTEPs and a kernel VXLAN device.

::

    c1 ── br0 [h1] tu0 ═ meshnet.vtep ═╗
    c2 ── br0 [h2] tu0 ═ meshnet.vtep ═╬═ sw ── x (no member)
    c3 ── br0 [h3] vx0 ═ kernel ═══════╝

Host i owns 10.48.i.0/24 and fd00:48:0:i::/64; its container has .2 and ::2.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

from meshnet.kernel.netns import inside
from meshnet.lab.poll import wait_until
from meshnet.lab.underlay import LabUnderlay
from meshnet.state import format_ip, format_mac
from meshnet.wire.mac import link_local_of, vtep_mac

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from meshnet.lab.commands import Namespace
    from meshnet.lab.underlay import Family
    from tests.bench.common import Scratch

VNI, PORT, MTU = 4801, 4789, 1450
HOSTS, USERSPACE = (1, 2, 3), (1, 2)
Document = dict[str, Any]


def subnets(i: int) -> list[str]:
    return [f"10.48.{i}.0/24", f"fd00:48:0:{i}::/64"]


def mac(i: int) -> bytes:
    return vtep_mac(ip_network(subnets(i)[0]))


def address(i: int, version: int = 4) -> str:
    """The address of a host's container."""
    return f"10.48.{i}.2" if version == 4 else f"fd00:48:0:{i}::2"


class Vtep:
    """A process and its control socket."""

    def __init__(self, host: Namespace, local: str, i: int, run_dir: Path, engine: str) -> None:
        self._host, self._local, self._i, self.run_dir = host, local, i, run_dir
        self._engine = engine
        self.process = self.start()

    def argv(self) -> list[str]:
        return [
            sys.executable, "-m", "meshnet.vtep", "--tun", "tu0", "--vni", str(VNI), "--port",
            str(PORT), "--local", self._local, "--mac", format_mac(mac(self._i)), "--mtu", str(MTU),
            "--engine", self._engine, "--run-dir", str(self.run_dir),
        ]  # fmt: skip

    def start(self) -> subprocess.Popen[str]:
        """Start it, and wait until it answers."""
        log = (self.run_dir.parent / f"vtep{self._i}.log").open("a")
        with log:
            self.process = self._host.popen(self.argv(), stdout=log, stderr=log)
        wait_until(self.answers, 10, "the VTEP answers")
        return self.process

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.ask(op="status")["pid"] == self.process.pid)
        return False

    def connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(10)
        try:
            made.connect(str(self.run_dir / "control.sock"))
        except OSError:
            made.close()
            raise
        return made

    def ask(self, **request: object) -> Document:
        """One request, which is to be answered with ok."""
        answer = self.ask_raw(json.dumps({"v": 1, **request}).encode() + b"\n")
        assert answer["ok"], answer
        return answer

    def ask_raw(self, data: bytes) -> Document:
        with self.connect() as made, made.makefile("rb") as answers:
            made.sendall(data)
            found: Document = json.loads(answers.readline())
        return found

    def counters(self, underlay_ip: str) -> Document:
        """Those of one peer."""
        peers: list[Document] = self.ask(op="counters")["peers"]
        return next(p for p in peers if p["underlay_ip"] == underlay_ip)

    def rss_kib(self) -> int:
        with open(f"/proc/{self.process.pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


class Site:
    """The hosts."""

    def __init__(
        self,
        spaces: Scratch,
        directory: Path,
        engine: str,
        family: Family = 4,
        vxlan: str = "remcsumrx",
    ) -> None:
        self.spaces, self._engine = spaces, engine
        self._vxlan_options = vxlan
        self.underlay = LabUnderlay(family=family, mtu_bytes=MTU + (50 if family == 4 else 70),
                                 gateway=False)  # fmt: skip
        parts = [f"{kind}{i}" for kind in "hc" for i in HOSTS]
        spaces.add("sw", "x", *parts)
        commands = self.underlay.switch_commands()
        for port in ("x", *(f"h{i}" for i in HOSTS)):
            commands += self.underlay.port_commands(port, spaces.name_of(port))
        spaces.ip("sw", commands)
        spaces.ip("x", self.underlay.host_commands(self.underlay.host_ip(9)))
        self.vteps: dict[int, Vtep] = {}
        for i in HOSTS:
            self._add_host(i, directory)
        for i, vtep in self.vteps.items():
            vtep.ask(op="replace", peers=[self.peer(j) for j in HOSTS if j != i])

    def ip_of(self, i: int) -> str:
        """The underlay address of a host."""
        return str(self.underlay.host_ip(i))

    def peer(self, i: int, **changes: object) -> Document:
        """A host as peers know it."""
        return {
            "underlay_ip": self.ip_of(i),
            "mac": format_mac(mac(i)),
            "subnets": subnets(i),
            "offload": i in USERSPACE,
            **changes,
        }

    def host(self, i: int) -> Namespace:
        return self.spaces.namespace(f"h{i}")

    def container(self, i: int) -> Namespace:
        return self.spaces.namespace(f"c{i}")

    @contextlib.contextmanager
    def socket_in(self, part: str, local: str) -> Iterator[socket.socket]:
        """A UDP socket in a namespace."""
        fd = os.open(self.spaces.namespace(part).netns_path, os.O_RDONLY)
        try:
            with inside(fd):
                made = socket.socket(
                    socket.AF_INET6 if ":" in local else socket.AF_INET, socket.SOCK_DGRAM
                )
        finally:
            os.close(fd)
        with made:
            made.bind((local, 0))
            yield made

    def _add_host(self, i: int, directory: Path) -> None:
        own = self.ip_of(i)
        for space in (self.host(i), self.container(i)):
            # Otherwise neighbour discovery waits a second for duplicate address detection.
            space.run(["sysctl", "-q", "-w", "net.ipv6.conf.default.accept_dad=0"])
        self.spaces.ip(
            f"h{i}",
            [
                *self.underlay.host_commands(self.underlay.host_ip(i)),
                f"link add br0 mtu {MTU} type bridge stp_state 0 mcast_snooping 0",
                f"address add 10.48.{i}.1/24 dev br0",
                f"address add fd00:48:0:{i}::1/64 dev br0 nodad",
                "link set br0 up",
                f"link add p0 mtu {MTU} type veth peer name eth0 mtu {MTU} "
                f"netns {self.spaces.name_of(f'c{i}')}",
                "link set p0 master br0 up",
            ],
        )
        host = self.host(i)
        for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            host.run(["sysctl", "-q", "-w", f"{name}=1"])
        self.spaces.ip(
            f"c{i}",
            [
                f"address add {address(i)}/24 dev eth0",
                f"address add {address(i, 6)}/64 dev eth0 nodad",
                "link set eth0 up",
                f"route add 0.0.0.0/0 via 10.48.{i}.1",
                f"route add ::/0 via fd00:48:0:{i}::1",
            ],
        )
        if i in USERSPACE:
            self.vteps[i] = Vtep(host, own, i, directory / f"run{i}", self._engine)
            routes = ["10.48.0.0/16", "fd00:48::/32"]
            self.spaces.ip(f"h{i}", [f"route add {cidr} dev tu0" for cidr in routes])
        else:
            self._add_kernel_vtep(i, own)

    def _add_kernel_vtep(self, i: int, own: str) -> None:
        commands = [
            f"link add vx0 address {format_mac(mac(i))} mtu {MTU} type vxlan id {VNI} "
            f"local {own} dstport {PORT} nolearning {self._vxlan_options}",
            "link set vx0 up",
        ]
        for j in HOSTS:
            if j != i:
                via, lladdr = format_ip(link_local_of(mac(j))), format_mac(mac(j))
                v4, v6 = subnets(j)
                commands += [
                    f"neighbour add 10.48.{j}.0 lladdr {lladdr} dev vx0 nud permanent",
                    f"neighbour add {via} lladdr {lladdr} dev vx0 nud permanent",
                    f"route add {v4} via 10.48.{j}.0 dev vx0 onlink",
                    f"route add {v6} via {via} dev vx0",
                ]
        self.spaces.ip(f"h{i}", commands)
        for j in HOSTS:
            if j != i:
                self.host(i).run(
                    ["bridge", "fdb", "add", format_mac(mac(j)), "dev", "vx0", "dst",
                     self.ip_of(j), "self"]
                )  # fmt: skip


SERVER = """
import hashlib, socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
s = socket.create_server((sys.argv[1], 0), family=family)
print(s.getsockname()[1], flush=True)
c, _ = s.accept()
h, n = hashlib.sha256(), 0
while data := c.recv(1 << 18):
    h.update(data); n += len(data)
print(n, h.hexdigest(), flush=True)
"""
CLIENT = """
import hashlib, random, socket, sys
host, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = random.Random(7).randbytes(size)
c = socket.create_connection((host, port), timeout=15)
c.sendall(data)
c.close()
print(len(data), hashlib.sha256(data).hexdigest())
"""


STREAM = """
import hashlib, random, signal, socket, sys, time
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
data = random.Random(7).randbytes(1 << 16)
c = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=15)
print("connected", flush=True)
h, n = hashlib.sha256(), 0
while not stopped:
    block = n.to_bytes(8, "big") + data
    c.sendall(block)
    h.update(block); n += len(block)
    time.sleep(0.001)
c.close()
print(n, h.hexdigest())
"""


@contextlib.contextmanager
def going_on(source: Namespace, target: Namespace, to: str) -> Iterator[None]:
    """Assert that a TCP connection goes on while the block runs, and loses no byte."""
    server = target.popen([sys.executable, "-S", "-c", SERVER, to])
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    client = source.popen([sys.executable, "-S", "-c", STREAM, to, port])
    assert client.stdout is not None
    assert client.stdout.readline() == "connected\n"
    try:
        yield
    finally:
        client.send_signal(signal.SIGINT)
        sent, _ = client.communicate(timeout=20)
    received, _ = server.communicate(timeout=20)
    assert received == sent
    assert int(sent.split()[0]) > 10_000_000


def transfer(source: Namespace, target: Namespace, to: str, size: int) -> None:
    """Send random bytes over one TCP connection, and compare digests."""
    server = target.popen([sys.executable, "-S", "-c", SERVER, to])
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    sent = source.run([sys.executable, "-S", "-c", CLIENT, to, port, str(size)], timeout=20).stdout
    received, _ = server.communicate(timeout=20)
    assert received == sent
