"""Shows the main job: three hosts, two networks, processes attached by pid, packets between them.

Run it with ``make demo``, as root.  The hosts are network namespaces on this machine; agents, etcd,
kernel devices and packets are real.  Everything is taken down at the end.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshnet.lab.poll import wait_until
from meshnet.lab.topology import Lab

if TYPE_CHECKING:
    from meshnet.lab.commands import Namespace
    from meshnet.lab.host import LabContainer, LabHost

MESHNET = [sys.executable, "-m", "meshnet.cli.main"]
_started = time.monotonic()


def step(text: str) -> None:
    """Say what comes next, and how long it has taken so far."""
    print(f"\n\033[1m[{time.monotonic() - _started:4.1f} s] {text}\033[0m", flush=True)


def show(where: Namespace, name: str, command: str, *, expect: int = 0) -> str:
    """Run a command as a user of that host would; show the command and its output."""
    print(f"\033[2m{name}$ {command}\033[0m", flush=True)
    argv = shlex.split(command)
    done = where.run(MESHNET + argv[1:] if argv[0] == "meshnet" else argv, check=False)
    print((done.stdout + done.stderr).rstrip(), flush=True)
    if done.returncode != expect:
        raise SystemExit(f"demo failed: {command!r} ended with {done.returncode}, not {expect}")
    return done.stdout


def attach(host: LabHost, network: str) -> tuple[LabContainer, dict[str, Any]]:
    """Start a process in a new network namespace and attach it by pid."""
    process = host.spawn_container()
    command = f"meshnet attach {process.pid} --net {network} --json"
    document: dict[str, Any] = json.loads(show(host, host.name, command))
    return process, document


def ip(document: dict[str, Any], key: str = "address") -> str:
    """Return an endpoint's address without its prefix length."""
    return str(document[key]).partition("/")[0]


def capture(lab: Lab, process: LabContainer, target: str, pcap: Path) -> None:
    """Ping while tcpdump listens on the underlay's switch, and decode one packet with scapy."""
    argv = ["tcpdump", "-i", "br0", "--immediate-mode", "-U", "-n", "-w", str(pcap)]
    tcpdump = lab.switch.popen([*argv, "udp", "port", "4789"], stdout=subprocess.DEVNULL)
    # tcpdump writes the file's header, 24 bytes, once it listens: a ping before that is lost to it.
    wait_until(lambda: pcap.exists() and pcap.stat().st_size >= 24, 10, "tcpdump")
    process.run(["ping", "-n", "-c1", target])
    wait_until(lambda: pcap.stat().st_size > 24, 10, "a packet")
    tcpdump.terminate()
    tcpdump.wait(timeout=10)

    from scapy.all import rdpcap

    print("\n".join(line for line in rdpcap(str(pcap))[0].show(dump=True).splitlines() if line))


def transfer(server: LabContainer, client: LabContainer, target: str) -> None:
    """Send TCP for two seconds between processes of two hosts."""
    server.popen(["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL)
    listening = ["ss", "-Hltn", "sport", "=", ":5201"]
    wait_until(lambda: server.run(listening).stdout, 10, "the iperf3 server")
    done = client.run(["iperf3", "-c", target, "-t", "2", "-C", "cubic", "-J"])
    received = json.loads(done.stdout)["end"]["sum_received"]
    print(
        f"{received['bytes'] / 1e6:.0f} MB in {received['seconds']:.1f} s: "
        f"{received['bits_per_second'] / 1e9:.2f} Gb/s through VXLAN"
    )


def serve_http(server: LabContainer, client: LabContainer, target: str) -> None:
    """Start a web server on one host, and ask it from another."""
    server.popen(["python3", "-m", "http.server", "8000"], stdout=subprocess.DEVNULL)
    listening = ["ss", "-Hltn", "sport", "=", ":8000"]
    wait_until(lambda: server.run(listening).stdout, 10, "the web server")
    code = f"import urllib.request as u; print(u.urlopen('http://{target}:8000/').status)"
    print(f"HTTP status from http://{target}:8000/:", client.run(["python3", "-c", code]).stdout)


def run(lab: Lab, directory: Path) -> None:
    """Show everything, on a lab that is up."""
    h1, h2, h3 = lab.hosts
    step("two networks, created on any host, known to all")
    show(h1, "h1", "meshnet network create prod --subnet 10.42.0.0/16 --subnet fd00:42::/48")
    show(h2, "h2", "meshnet network create dev --subnet 10.43.0.0/16")
    show(h3, "h3", "meshnet network ls")

    step("processes, each with only a network namespace, attached by pid")
    one, endpoint1 = attach(h1, "prod")
    two, endpoint2 = attach(h2, "prod")
    _three, endpoint3 = attach(h3, "prod")
    stranger, _ = attach(h3, "dev")
    show(one, "process on h1", "ip -br addr show eth0")

    step("packets from host to host, IPv4 and IPv6")
    show(one, "process on h1", f"ping -n -c2 -i0.2 {ip(endpoint2)}")
    show(one, "process on h1", f"ping -n -c2 -i0.2 {ip(endpoint3, 'address6')}")

    step("another network is another world")
    show(stranger, "process on dev", f"ping -n -c1 -W1 {ip(endpoint1)}", expect=1)

    step("transfers")
    serve_http(two, one, ip(endpoint2))
    transfer(two, one, ip(endpoint2))

    step("one VXLAN packet on the underlay, layer by layer")
    capture(lab, one, ip(endpoint2), directory / "vxlan.pcap")

    step("the mesh as its hosts see it")
    show(h2, "h2", "meshnet hosts")
    show(h2, "h2", "meshnet endpoint ls")
    show(h3, "h3", "meshnet status")


def main() -> None:
    """Bring the lab up, run, take it down."""
    step("three hosts (network namespaces), a switch and an etcd")
    with tempfile.TemporaryDirectory() as directory:
        lab = Lab("demo", hosts=3)
        lab.up(lambda line: print(f"  {line}", flush=True))
        try:
            run(lab, Path(directory))
        finally:
            step("taking everything down")
            lab.down(lambda line: print(f"  {line}", flush=True))
    step("done")


if __name__ == "__main__":
    main()
