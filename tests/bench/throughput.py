"""TCP throughput and ping round trip between containers on two hosts.

Four paths, measured in turn, one flow at a time::

    vxlan      container ─ meshnet's VXLAN ─ container      against  handmade
    handmade   container ─ VXLAN made with ip(8) ─ container
    direct     container ─ meshnet's direct routing ─ container  against  underlay
    underlay   host ─ host, no overlay and no nftables
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshnet.lab.poll import wait_until
from meshnet.lab.process import is_listening
from meshnet.lab.topology import Lab
from tests.bench.common import at_least, at_most, median_of, median_ratio, scratch
from tests.bench.handmade import Handmade
from tests.netns.mesh import address_of, attach, create_network

if TYPE_CHECKING:
    from collections.abc import Iterator

    from meshnet.lab.commands import Namespace
    from tests.bench.common import Measure, Run, Scratch

ROUNDS = 6
FLOW_S = 3
_PINGS = 400
_PORT = 5201
_TIME = re.compile(r"time=([0-9.]+) ms")


@dataclass(frozen=True, slots=True)
class Way:
    """A path to measure: from a namespace to an address of another."""

    name: str
    client: Namespace
    server: Namespace
    address: str

    def start_server(self) -> None:
        """Serve iperf3 until the namespaces are taken down."""
        child = self.server.popen(["iperf3", "-s"], stdout=-3)
        wait_until(lambda: is_listening(child.pid, _PORT), 10, f"iperf3 for {self.name}")

    def measure_gbps(self, flow_s: float = FLOW_S) -> float:
        """What one TCP flow brings to the other end, in Gb/s."""
        argv = ["iperf3", "-c", self.address, "-t", str(flow_s), "-C", "cubic", "-J"]
        output = json.loads(self.client.run(argv, timeout=flow_s + 30).stdout)
        return float(output["end"]["sum_received"]["bits_per_second"]) / 1e9

    def measure_rtt_us(self) -> float:
        """The median round trip of pings every 2 ms, in microseconds."""
        argv = ["ping", "-n", "-i", "0.002", "-c", str(_PINGS), self.address]
        times = [float(t) for t in _TIME.findall(self.client.run(argv).stdout)]
        return statistics.median(times) * 1000


def run(run: Run) -> list[Measure]:
    """See the module."""
    with scratch() as spaces, _lab() as lab:
        run.say("building a lab of two hosts, and two hosts by hand")
        lab.up()
        ways = build_ways(lab, spaces)
        gbps: dict[str, list[float]] = {name: [] for name in ways}
        rtt_us: dict[str, list[float]] = {name: [] for name in ways}
        rounds = run.rounds or ROUNDS
        for number in range(1, rounds + 1):
            for way in ways.values():
                rtt_us[way.name].append(way.measure_rtt_us())
            for way in ways.values():
                gbps[way.name].append(way.measure_gbps())
            values = ", ".join(f"{name} {v[-1]:.2f}" for name, v in gbps.items())
            run.say(f"round {number} of {rounds}: {values} Gb/s")
    return [
        *(median_of(f"TCP {name}", values, "Gb/s") for name, values in gbps.items()),
        median_ratio("TCP vxlan / handmade", gbps["vxlan"], gbps["handmade"], at_least(0.97)),
        median_ratio("TCP direct / underlay", gbps["direct"], gbps["underlay"], at_least(0.9)),
        *(median_of(f"ping {name}", values, "µs") for name, values in rtt_us.items()),
        median_ratio("ping vxlan / handmade", rtt_us["vxlan"], rtt_us["handmade"], at_most(1.1)),
    ]


@contextlib.contextmanager
def _lab() -> Iterator[Lab]:
    lab = Lab(f"bench{os.getpid()}", hosts=2)
    try:
        yield lab
    finally:
        lab.down()


def build_ways(lab: Lab, spaces: Scratch) -> dict[str, Way]:
    """The four ways, each with a server that listens."""
    create_network(lab, "tunnel", "--subnet", "10.42.0.0/16", "--mode", "vxlan")
    create_network(lab, "direct", "--subnet", "10.44.0.0/16", "--mode", "vxlan", "--direct-routing")
    handmade = Handmade(spaces)
    ways = [
        _lab_way(lab, "vxlan", "tunnel"),
        Way("handmade", handmade.container(1), handmade.container(2), handmade.container_ip(2)),
        _lab_way(lab, "direct", "direct"),
        Way("underlay", handmade.host(1), handmade.host(2), handmade.host_ip(2)),
    ]
    for way in ways:
        way.start_server()
        way.client.run(["ping", "-n", "-c", "1", "-W", "2", way.address])
    return {way.name: way for way in ways}


def _lab_way(lab: Lab, name: str, network: str) -> Way:
    h1, h2 = lab.hosts
    client, server = h1.spawn_container(), h2.spawn_container()
    attach(client, h1, network)
    return Way(name, client, server, address_of(attach(server, h2, network)))
