"""Mode ``underlay-bridge`` on labs: hosts whose link goes into a bridge and back under traffic."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from meshnet.lab.poll import wait_until
from tests.netns.mesh import (
    PingStream,
    address_of,
    attach,
    create_network,
    meshnet,
    ping,
    silenced,
    wait_in_sync,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from meshnet.lab.commands import Namespace
    from meshnet.lab.host import LabHost
    from meshnet.lab.topology import Lab

    MakeLab = Callable[..., Lab]

pytestmark = pytest.mark.root
LAN = (
    *("--mode", "underlay-bridge", "--subnet", "10.255.0.0/16", "--gateway", "10.255.0.1"),
    *("--range", "10.255.8.1-10.255.8.250", "--parent", "eth0"),
)
MOST_LOST = 3
SILENT = (
    "oifname h1 arp operation reply arp daddr ip 0.0.0.0 limit rate over 1/hour burst 1 packets"
)
"""The gateway answers one host's probes once, before the move, and then no more."""
RECEIVER = """
import hashlib, socket
with socket.create_server(("", 7000)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    digest, size = hashlib.sha256(), 0
    while data := connection.recv(65536):
        digest.update(data)
        size += len(data)
    print(size, digest.hexdigest())
"""
SENDER = """
import hashlib, random, select, socket, sys
digest, size, source = hashlib.sha256(), 0, random.Random(1)
with socket.create_connection((sys.argv[1], 7000)) as connection:
    while not select.select([sys.stdin], [], [], 0.002)[0]:
        data = source.randbytes(20_000)
        connection.sendall(data)
        digest.update(data)
        size += len(data)
print(size, digest.hexdigest())
"""


def _look(host: Namespace) -> tuple[str, str, str]:
    """``ip addr`` and ``ip route`` of a host, as they are printed."""
    looks = ("ip addr show dev eth0", "ip route show table all", "ip -6 route show table all")
    shown = [host.run(look.split()).stdout for look in looks]
    return shown[0], shown[1], shown[2]


def _wait_until_settled(host: Namespace) -> tuple[str, str, str]:
    """The same once addresses are usable, so that nothing about them changes by itself."""
    wait_until(lambda: "tentative" not in _look(host)[0], 10, "duplicate address detection")
    return _look(host)


def _index(host: Namespace, link: str) -> str:
    return host.run(["ip", "-o", "link", "show", link]).stdout.partition(":")[0]


@contextlib.contextmanager
def _transfer(source: LabHost, target: LabHost) -> Iterator[None]:
    """A TCP connection that carries bytes while the block runs, all of which must arrive."""
    argv = [sys.executable, "-c"]
    receiver = target.popen([*argv, RECEIVER])
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == "ready\n"
    address = str(target.underlay_ip)
    sender = source.popen([*argv, SENDER, address], stdin=subprocess.PIPE)
    yield
    sent, _ = sender.communicate(timeout=10)
    received, _ = receiver.communicate(timeout=10)
    assert sent == received
    assert int(sent.split()[0]) > 100_000


@contextlib.contextmanager
def _hardly_lost(what: str, *ways: tuple[Namespace, str]) -> Iterator[None]:
    """Assert that of a ping a millisecond hardly any is lost, on any way, while the block runs."""
    streams = [PingStream(source, address) for source, address in ways]
    yield
    results = [stream.stop() for stream in streams]
    print(f"{what}: lost of sent:", *(f"{lost}/{sent}" for sent, lost in results))
    for sent, lost in results:
        assert sent > 50
        assert lost <= MOST_LOST


def _wait_for_stage(host: LabHost, stage: str | None) -> None:
    """Wait until the host's only journal shows a stage; None: it is gone."""
    directory = host.state_dir / "takeover"

    def reached() -> bool:
        found = [json.loads(file.read_bytes())["stage"] for file in directory.glob("*.json")]
        return found == ([] if stage is None else [stage])

    with contextlib.suppress(FileNotFoundError):
        wait_until(reached, 10, f"stage {stage}")
        return
    wait_until(reached, 10, f"stage {stage}")


def test_a_network_in_the_place_of_the_hosts_links(make_lab: MakeLab) -> None:
    lab = make_lab(2)
    h1, h2 = lab.hosts
    create_network(lab, "prod", "--subnet", "10.42.0.0/16")
    inner = [host.spawn_container() for host in (h1, h2)]
    over = [attach(c, h, "prod") for c, h in zip(inner, (h1, h2), strict=True)]
    outsider = lab.add_host("outsider", agent=False)
    ways = (
        (outsider, str(h1.underlay_ip)),
        (h2, str(lab.underlay.gateway_ip)),
        (inner[0], address_of(over[1])),
    )
    assert all(ping(*way) for way in ways)
    before = [_wait_until_settled(host) for host in (h1, h2)]
    with _transfer(h1, outsider), _transfer(outsider, h2):
        with _hardly_lost("taken over", *ways):
            created = meshnet(h1, "network", "create", "lan", *LAN)
            for host in (h1, h2):
                wait_in_sync(host)
        assert created["mtu"] == 1500
        bridge = f"mnp{created['vni']}"
        for host in (h1, h2):
            assert f"inet {host.underlay_ip}/16" in host.run(["ip", "addr", "show", bridge]).stdout
        _reach(lab, (h1, h2), outsider)
        index = _index(h1, bridge)
        h1.kill_agent()
        h1.start_agent()
        wait_in_sync(h1)
        assert _index(h1, bridge) == index
        two = ["--mode", "underlay-bridge", "--subnet", "10.254.0.0/16", "--parent", "eth0"]
        assert "eth0 is network lan's" in meshnet(h1, "network", "create", "two", *two, status=5)
        two[1] = "macvlan"
        assert "eth0 is network lan's" in meshnet(h1, "network", "create", "two", *two, status=5)
        with _hardly_lost("given back", *ways):
            meshnet(h1, "network", "rm", "lan")
            for host in (h1, h2):
                _wait_for_stage(host, None)
                wait_in_sync(host)
    assert [_look(host) for host in (h1, h2)] == before
    assert all(ping(*way) for way in ways)


def _reach(lab: Lab, hosts: tuple[LabHost, LabHost], outsider: LabHost) -> None:
    """Endpoints of two hosts reach each other and everybody else, and are reached."""
    containers = [host.spawn_container() for host in hosts]
    ends = [attach(c, h, "lan") for c, h in zip(containers, hosts, strict=True)]
    addresses = [address_of(end) for end in ends]
    others = [str(m.underlay_ip) for m in (*hosts, outsider)]
    others += [str(lab.underlay.gateway_ip), lab.outside_ip]
    for container, other in zip(containers, reversed(addresses), strict=True):
        for target in (other, *others):
            assert ping(container, target), target
    for machine in (*hosts, outsider):
        for address in addresses:
            assert ping(machine, address)
    assert "mtu 1500" in containers[0].run(["ip", "link", "show", "eth0"]).stdout
    for container, host in zip(containers, hosts, strict=True):
        meshnet(host, "detach", container.pid, "--net", "lan")
        wait_until(lambda h=host: "mne" not in _ports(h), 5, "detached")  # type: ignore[misc]


def _ports(host: Namespace) -> str:
    text = host.run(["ip", "-o", "link", "show", "type", "veth"]).stdout
    return "\n".join(line for line in text.splitlines() if "master mnp" in line)


def test_a_gateway_that_falls_silent_and_processes_that_are_killed(make_lab: MakeLab) -> None:
    lab = make_lab(1, agent_args=("--takeover-confirm", "3"))
    (host,) = lab.hosts
    host.run(["ip", "route", "add", "192.0.2.0/24", "via", str(lab.underlay.gateway_ip)])
    before = _wait_until_settled(host)

    def error() -> str:
        (network,) = meshnet(host, "status")["networks"]
        return " ".join(network["errors"])

    with silenced(lab, SILENT):
        assert meshnet(host, "network", "create", "lan", *LAN)["mtu"] is None
        assert "gateway 10.255.0.1 did not answer through bridge" in error()
    assert _look(host) == before
    host.stop_agent()

    # The agent killed while the gateway is waited for: it is undone all the same, or confirmed.
    for stage in (None, "confirmed"):
        with silenced(lab, SILENT):
            host.start_agent(wait=False)
            _wait_for_stage(host, "moved")
            host.kill_agent()
            if stage is None:
                _wait_for_stage(host, None)
                assert _look(host) == before
        if stage is not None:
            _wait_for_stage(host, stage)
    host.start_agent()
    wait_in_sync(host)
    host.stop_agent()
    assert "inet" not in _look(host)[0]
    release = [sys.executable, "-m", "meshnet.kernel.takeover", "return"]
    host.run([*release, "--state-dir", str(host.state_dir)])
    assert _look(host) == before

    # The process itself killed: the agent undoes what it did.
    with silenced(lab, SILENT):
        host.start_agent(wait=False)
        _wait_for_stage(host, "moved")
        os.kill(_find_takeover(host), signal.SIGKILL)
        _wait_for_stage(host, None)
        host.wait_agent_ready()
        wait_until(lambda: "killed by signal 9" in error(), 5, "its end is told of")
    assert _look(host) == before
    meshnet(host, "network", "rm", "lan")
    missing = [option.replace("eth0", "eth7") for option in LAN]
    meshnet(host, "network", "create", "lan", *missing)
    assert re.search("link eth7, its --parent, does not exist", error())


def _find_takeover(host: LabHost) -> int:
    """The pid of the process at work for a host."""
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            words = Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
            if b"meshnet.kernel.takeover" in words and str(host.state_dir).encode() in words:
                return int(entry)
    raise AssertionError("no takeover is under way")
