"""Fifty real agents and one etcd: from the put of a new host's keys to its route on every host.

Every agent is a process with a network namespace of its own; the hosts that join are simulated.
The last of a host's objects is its route: when it is there, the host can be reached.  One thread
listens to the kernels of all namespaces, so what is seen is what the kernel did, not what an agent
says.  All agents share this machine's cores: on real hosts each has its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from typing import TYPE_CHECKING

from meshnet.lab.topology import Lab
from meshnet.model import HostId
from tests.bench.common import Measure, at_most, percentile
from tests.bench.exact import differences
from tests.bench.notifications import Watch
from tests.bench.simulated import Object, SimulatedHost, SimulatedMesh
from tests.bench.site import AgentView, connect

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from meshnet.lab.host import LabHost
    from tests.bench.common import Run

AGENTS, JOINS = 50, 60
_STARTED_AT_ONCE = 5
_EVERY_S = 0.5
_DEADLINE_S = 10.0
_BOUND_MS = 100
_counter = itertools.count()


def run(run: Run) -> list[Measure]:
    """See the module."""
    agents = run.sizes[0] if run.sizes else AGENTS
    with _agents(run, agents) as (lab, mesh):
        views = [AgentView(host) for host in lab.hosts]
        before_s = [view.cpu_s() for view in views]
        delays_ms = _join_one_by_one(lab, mesh, run)
        cpu_s = sum(view.cpu_s() - b for view, b in zip(views, before_s, strict=True))
        _check(lab.hosts, mesh)
    every = [delay for delays in delays_ms for delay in delays]
    last = [max(delays) for delays in delays_ms]
    return [
        Measure(f"one of {agents} agents, p50", percentile(every, 50), "ms", None, tuple(every)),
        Measure(f"one of {agents} agents, p99", percentile(every, 99), "ms", at_most(_BOUND_MS)),
        Measure(f"first of {agents}, p50", percentile([min(d) for d in delays_ms], 50), "ms"),
        Measure(f"last of {agents}, p50", percentile(last, 50), "ms", None, tuple(last)),
        Measure(f"last of {agents}, p99", percentile(last, 99), "ms", at_most(_BOUND_MS)),
        Measure("CPU of one agent for one join", cpu_s / len(every) * 1000, "ms"),
    ]


@contextlib.contextmanager
def _agents(run: Run, count: int) -> Iterator[tuple[Lab, SimulatedMesh]]:
    """A lab of so many hosts, all in sync on the simulated mesh's network."""
    name = f"conv{os.getpid()}x{next(_counter)}"
    with Lab(name, hosts=count, start_agents=False) as lab, connect(lab) as gateway:
        mesh = SimulatedMesh(gateway)
        mesh.create_network()
        hosts = lab.hosts
        for number, host in enumerate(hosts):
            # Beforehand: an agent that loses the race for the lowest subnet takes a random one,
            # which may be one of those that simulated hosts are about to have.
            mesh.reserve(HostId(host.name), number)
        # A few at a time: a start is a second of CPU.
        for first in range(0, count, _STARTED_AT_ONCE):
            batch = hosts[first : first + _STARTED_AT_ONCE]
            for host in batch:
                host.start_agent(wait=False)
            for host in batch:
                host.wait_agent_ready()
        for host in hosts:
            AgentView(host).wait_in_sync(count - 1)
        run.say(f"{count} agents are in sync")
        yield lab, mesh


def _join_one_by_one(lab: Lab, mesh: SimulatedMesh, run: Run) -> list[list[float]]:
    """Delays in milliseconds from before the put: for each join, one of every agent."""
    joins = (run.rounds or 1) * JOINS
    delays_ms = []
    with Watch({host.name: host.netns_path for host in lab.hosts}) as watch:
        for number in range(1, joins + 1):
            joined = mesh.new_hosts(1)
            routes = {o for o in mesh.objects(joined) if o.kind == "route"}
            began = time.monotonic()
            mesh.add(joined)
            at = _routes_at(watch, routes, len(lab.hosts))
            delays_ms.append([(moment - began) * 1000 for moment in at])
            _quiet_until(watch, began + _EVERY_S)
            if number % 20 == 0:
                run.say(f"{number} of {joins} joined; the last took {max(delays_ms[-1]):.0f} ms")
    return delays_ms


def _routes_at(watch: Watch, routes: set[Object], places: int) -> list[float]:
    """When the route came, in each of so many namespaces."""
    (route,) = routes
    at: dict[str, float] = {}
    deadline = time.monotonic() + _DEADLINE_S
    while len(at) < places:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"only {len(at)} of {places} agents have the route")
        for notification in watch.read(left_s):
            if notification.object == route and notification.there:
                at.setdefault(notification.place, notification.at)
    return list(at.values())


def _quiet_until(watch: Watch, moment: float) -> None:
    while (left_s := moment - time.monotonic()) > 0:
        for _ in watch.read(left_s):
            pass


def _check(hosts: Sequence[LabHost], mesh: SimulatedMesh) -> None:
    """Compare every kernel with what it should hold, the other real hosts included."""
    for host in hosts:
        AgentView(host).wait_in_sync(len(hosts) - 1 + len(mesh.hosts), mesh.gateway.revision)
    for host in hosts:
        others = [real for name, real in _real(hosts).items() if name != host.name]
        wrong = differences(host, mesh, others)
        if wrong:
            raise RuntimeError(f"{host.name} has {len(wrong)} differences: {wrong[:5]}")


def _real(hosts: Sequence[LabHost]) -> dict[str, SimulatedHost]:
    """The lab's own hosts by name, as simulated ones with the same subnet and address."""
    return {
        host.name: SimulatedHost(0, number, host.underlay_ip) for number, host in enumerate(hosts)
    }
