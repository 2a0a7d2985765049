"""Ten published ports against those of Docker's own ``bridge`` network, in the same run.

::

    client ── switch ─┬─ h1      ten containers on a network of mode bridge    8081…8090 → 80
                      └─ docker  ten containers on Docker's default network    8081…8090 → 80

The same server program (``web.c``) in all containers, the same load from the same client: a new
connection for each request, and one connection for many.  Docker is Debian's, with the settings of
its network as they come: NAT by iptables, and a proxy process for what comes from the host itself.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from meshnet.cli.client import Client
from meshnet.lab.topology import Lab
from tests.bench.common import Measure, median_of, median_ratio
from tests.bench.docker import Docker, open_docker
from tests.bench.native import compile_program

if TYPE_CHECKING:
    from meshnet.lab.host import LabHost
    from tests.bench.common import Run

ROUNDS = 15
_PORTS = range(8081, 8091)
_UNDER_WAY = 16
_LOAD_MS = 500
_STACKS = ("meshnet", "docker")
_KINDS = {"new connection": "0", "keep-alive": "1"}
_UNITS = {"requests": "/s", "p50": "µs", "p99": "µs"}


class Load(NamedTuple):
    """What a load came to; fields are named as in `_UNITS`."""

    requests: float
    p50: float
    p99: float


def run(run: Run) -> list[Measure]:
    """See the module."""
    samples: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    with (
        tempfile.TemporaryDirectory() as name,
        Lab(f"bench{os.getpid()}", hosts=1) as lab,
    ):
        directory = Path(name)
        web = compile_program("web", directory, static=True)
        client, other = (lab.add_host(part, agent=False) for part in ("client", "docker"))
        run.say("ten containers of meshnet")
        _start_ours(lab.host("h1"), web)
        run.say("ten containers of Docker")
        with open_docker(other, directory / "docker") as docker:
            _start_dockers(docker, web)
            hosts = dict(zip(_STACKS, (lab.host("h1"), other), strict=True))
            rounds = run.rounds or ROUNDS
            for number in range(rounds):
                for kind, stack in itertools.product(_KINDS, _STACKS[:: (-1) ** number]):
                    load = _load(client, hosts[stack], web, _KINDS[kind])
                    for what, value in load._asdict().items():
                        samples[kind, what, stack].append(value)
                values = ", ".join(
                    f"{kind} {samples[kind, 'requests', 'meshnet'][-1]:,.0f} to "
                    f"{samples[kind, 'requests', 'docker'][-1]:,.0f} requests a second"
                    for kind in _KINDS
                )
                run.say(f"round {number + 1} of {rounds}: {values}")
    return [
        *(
            median_ratio(
                f"{kind}: {what}, meshnet by Docker",
                samples[kind, what, "meshnet"],
                samples[kind, what, "docker"],
            )
            for kind, what in itertools.product(_KINDS, _UNITS)
        ),
        *(
            median_of(f"{kind}: {what}, {stack}", samples[kind, what, stack], unit)
            for kind, (what, unit), stack in itertools.product(_KINDS, _UNITS.items(), _STACKS)
        ),
    ]


def _start_ours(host: LabHost, web: Path) -> None:
    client = Client(str(host.socket_path))
    network = {"name": "local", "mode": "bridge", "subnets": ["172.30.0.0/16"]}
    client.post("networks", body=network)
    for port in _PORTS:
        container = host.spawn_container([str(web), "serve", "80"])
        ports = [f"{port}:80"]
        client.post("attach", body={"pid": container.pid, "network": "local", "publish": ports})


def _start_dockers(docker: Docker, web: Path) -> None:
    docker.load("web", web)
    for port in _PORTS:
        docker.serve("web", f"{port}:80", ["/web", "serve", "80"])


def _load(client: LabHost, host: LabHost, web: Path, keep: str) -> Load:
    address, ports = str(host.underlay_ip), [str(port) for port in _PORTS]
    argv = [str(web), "load", str(_UNDER_WAY), str(_LOAD_MS), keep, address, *ports]
    requests, taken_ns, p50_ns, p99_ns = (int(f) for f in client.run(argv).stdout.split())
    return Load(requests / taken_ns * 1e9, p50_ns / 1000, p99_ns / 1000)
