"""A lab with the client at hand: what the tests of the whole product talk to."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import threading
from ipaddress import ip_interface
from subprocess import CompletedProcess
from typing import TYPE_CHECKING, Any

from meshnet.cli.main import run_command
from meshnet.lab.poll import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from scapy.packet import Packet

    from meshnet.lab.commands import Namespace
    from meshnet.lab.host import LabContainer, LabHost
    from meshnet.lab.topology import Lab

Document = dict[str, Any]


def meshnet(host: LabHost, *arguments: object, status: int = 0) -> Any:  # noqa: ANN401
    """Run the client on a host; returns its JSON document, or its error line.

    Args:
        status: the exit status it must have.
    """
    done = run_client(host, *arguments, "--json")
    assert done.returncode == status, f"{arguments}: {done.returncode}: {done.stderr}{done.stdout}"
    if status:
        assert done.stderr.count("\n") == 1, f"not one line: {done.stderr!r}"
        assert done.stdout == ""
        return done.stderr.strip()
    assert done.stderr == "", done.stderr
    return json.loads(done.stdout)


def run_client(host: LabHost, *arguments: object) -> CompletedProcess[str]:
    """Run the client on a host, and wait for it.

    It runs in this process, for a new one costs more than most commands; but not beside another
    one in a thread, for standard output is the process's.
    """
    argv = ["--socket", str(host.socket_path), *map(str, arguments)]
    if threading.current_thread() is not threading.main_thread():
        return host.run([sys.executable, "-m", "meshnet.cli.main", *argv], check=False)
    streams = [io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            status = run_command(argv)
        except SystemExit as end:  # of the parser
            status = int(end.code or 0)
    output, errors = (stream.buffer.getvalue().decode() for stream in streams)
    return CompletedProcess(argv, status, output, errors)


def attach(container: LabContainer, host: LabHost, network: str, *options: object) -> Document:
    """Attach a container."""
    document: Document = meshnet(host, "attach", container.pid, "--net", network, *options)
    return document


def address_of(document: Document, version: int = 4) -> str:
    """The address of an endpoint's document, without its prefix length."""
    for key in ("address", "address6"):
        if key in document and ip_interface(document[key]).version == version:
            return str(ip_interface(document[key]).ip)
    raise AssertionError(f"no IPv{version} address in {document}")


BRIEFLY = ("-W0.3",)
"""For a `ping` that nobody may answer."""


def ping(source: Namespace, address: str, *options: str) -> bool:
    """Whether one of two pings is answered; the second is for the first's neighbour discovery."""
    argv = ["ping", "-n", "-c2", "-i0.05", "-W1", *options, address]
    return " 0 received" not in source.run(argv, check=False).stdout


class PingStream:
    """Pings every millisecond in the background, and counts what got lost."""

    def __init__(self, source: Namespace, address: str, interval_s: float = 0.001) -> None:
        argv = ["ping", "-n", "-q", "-D", f"-i{interval_s}", "-W1", address]
        self._child = source.popen(argv)

    def stop(self) -> tuple[int, int]:
        """End it; returns packets sent and lost."""
        self._child.send_signal(2)
        output, _ = self._child.communicate(timeout=10)
        found = re.search(r"(\d+) packets transmitted, (\d+) received", output)
        assert found, output
        sent, received = int(found[1]), int(found[2])
        return sent, sent - received


@contextlib.contextmanager
def lossless(source: Namespace, *addresses: str) -> Iterator[None]:
    """Assert that not one of a thousand pings a second is lost while the block runs."""
    streams = [PingStream(source, address) for address in addresses]
    try:
        yield
    finally:
        results = [stream.stop() for stream in streams]
    for sent, lost in results:
        assert sent > 50
        # The last one may be on its way when ping is told to stop.
        assert lost <= 1, f"{lost} of {sent} lost"


def wait_in_sync(host: LabHost, *, peers: int | None = None, deadline_s: float = 10) -> Document:
    """Wait until every network of a host is in sync (and has that many peers)."""

    def in_sync() -> Document | None:
        document: Document = meshnet(host, "status")
        networks = document["networks"]
        good = all(n["in_sync"] and (peers is None or n["peers"] == peers) for n in networks)
        return document if good and networks else None

    return wait_until(in_sync, deadline_s, f"{host.name} in sync") or {}


def create_network(lab: Lab, name: str, *options: str) -> Document:
    """Create a network and wait until all hosts of the mesh have it."""
    members = [host for host in lab.hosts if host.is_agent_running()]
    document: Document = meshnet(members[0], "network", "create", name, *options)
    for host in members:
        wait_in_sync(host, peers=len(members) - 1)
    return document


@contextlib.contextmanager
def captured(lab: Lab, pcap: Path, expression: str = "") -> Iterator[list[Packet]]:
    """Capture what crosses the underlay's switch; the list is full after the block."""
    from scapy.utils import rdpcap

    packets: list[Packet] = []
    argv = ["tcpdump", "-i", "br0", "--immediate-mode", "-U", "-n", "-w", str(pcap)]
    child = lab.switch.popen([*argv, *expression.split()], stdout=subprocess.DEVNULL)
    # It writes the file's header once it listens.
    wait_until(lambda: pcap.exists() and pcap.stat().st_size >= 24, 10, "tcpdump")
    yield packets
    child.terminate()
    child.wait(timeout=10)
    packets.extend(rdpcap(str(pcap)))


@contextlib.contextmanager
def silenced(lab: Lab, rule: str) -> Iterator[None]:
    """Have the underlay's switch drop packets that match a rule of nftables' bridge family."""
    table = "table bridge silence { chain %s { type filter hook %s priority 0; %s drop; }; }"
    hook = "output" if "arp" in rule else "forward"
    lab.switch.run(["nft", table % (hook, hook, rule)])
    try:
        yield
    finally:
        lab.switch.run(["nft", "delete table bridge silence"])
