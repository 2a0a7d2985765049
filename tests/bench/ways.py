"""Paths to measure, from a namespace to an address of another, and what is sent on them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from meshnet.lab.poll import wait_until
from meshnet.lab.process import is_listening
from meshnet.lab.topology import Lab
from tests.netns.mesh import address_of, attach, create_network

if TYPE_CHECKING:
    from collections.abc import Iterator

    from meshnet.lab.commands import Namespace

_PINGS = 200
_PORT = 5201
_ATTEMPTS, _PAUSE_S = 3, 0.3
_TIME = re.compile(r"time=([0-9.]+) ms")


class Flow(NamedTuple):
    """TCP flows as iperf3 saw them.

    Attributes:
        gbps: what arrived, all flows together.
        cpus: what both ends used, 1.0 is one CPU.
        gigabytes: what arrived.
    """

    gbps: float
    cpus: float
    gigabytes: float


@dataclass(frozen=True, slots=True)
class Way:
    """A path to measure: from a namespace to an address of another."""

    client: Namespace
    server: Namespace
    address: str

    def start_server(self) -> int:
        """Serve iperf3 until the namespaces are taken down; returns the process's id."""
        log = self.server.popen(["iperf3", "-s", "--logfile", os.devnull])
        wait_until(lambda: is_listening(log.pid, _PORT), 10, f"iperf3 at {self.address}")
        return log.pid

    def send(self, flow_s: int, *options: str) -> Flow:
        """Send for some seconds; one TCP flow, unless the options say otherwise.

        Raises:
            RuntimeError: iperf3 could not, again and again; the text has its reason.
        """
        argv = ["iperf3", "-c", self.address, "-t", str(flow_s), "-C", "cubic", "-J", *options]
        for _ in range(_ATTEMPTS):
            document = json.loads(self.client.run(argv, check=False, timeout=flow_s + 30).stdout)
            # Its server may still be at the last one: then "the server is busy".
            if "error" not in document and document["end"]:
                return _flow(document["end"])
            time.sleep(_PAUSE_S)
        raise RuntimeError(f"iperf3 to {self.address}: {document.get('error', 'no result')}")

    def ping_us(self) -> float:
        """Round trip of pings every 2 ms, in µs: the mean of the middle half.

        ping(8) prints whole microseconds, too coarse for a median.
        """
        argv = ["ping", "-n", "-i", "0.002", "-c", str(_PINGS), self.address]
        times = sorted(float(t) for t in _TIME.findall(self.client.run(argv).stdout))
        quarter = len(times) // 4
        return statistics.mean(times[quarter : len(times) - quarter]) * 1000


def _flow(end: dict[str, Any]) -> Flow:
    used, received = end["cpu_utilization_percent"], end["sum_received"]
    return Flow(
        received["bits_per_second"] / 1e9,
        (used["host_total"] + used["remote_total"]) / 100,
        received["bytes"] / 1e9,
    )


@contextlib.contextmanager
def two_hosts() -> Iterator[Lab]:
    """A lab of two hosts that is not up yet; nothing is left of it."""
    lab = Lab(f"bench{os.getpid()}", hosts=2)
    try:
        yield lab
    finally:
        lab.down()


def lab_ways(lab: Lab, network: str, subnet: str, *options: str) -> tuple[Way, Way]:
    """Make a network, with a container on each of the lab's two hosts; returns there and back."""
    create_network(lab, network, "--subnet", subnet, "--mode", "vxlan", *options)
    h1, h2 = lab.hosts
    c1, c2 = h1.spawn_container(), h2.spawn_container()
    first = address_of(attach(c1, h1, network))
    second = address_of(attach(c2, h2, network))
    return Way(c1, c2, second), Way(c2, c1, first)
