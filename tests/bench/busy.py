"""Attaching while the same agent programs 10,000 hosts.

The hosts leave and join again, all at once, while containers are attached and detached in a loop
through the API's socket; beside it the same with nothing else to do.  What counts is the agent's
own time for an attach (``agent_ms``) and, from the caller's side, the whole request, which also has
the time that it waited for the agent's event loop.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from meshnet.lab.poll import wait_until
from tests.bench.common import Measure, at_most, percentile
from tests.bench.simulated import NAME
from tests.bench.site import SYNC_DEADLINE_S, site

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from meshnet.lab.host import LabContainer
    from tests.bench.common import Bound, Run
    from tests.bench.site import Site

HOSTS, ROUNDS = 10_000, 3
_CONTAINERS = 10
_IDLE_ATTACHES = 200
_BOUND_MS = 20


class Attach(NamedTuple):
    """One attach, in milliseconds."""

    agent_ms: float
    request_ms: float


def run(run: Run) -> list[Measure]:
    """See the module."""
    hosts = run.sizes[0] if run.sizes else HOSTS
    busy: list[Attach] = []
    leaving: list[Attach] = []
    with site() as place, ThreadPoolExecutor(1) as pool:
        mesh = place.mesh
        mesh.add(mesh.new_hosts(hosts))
        place.start_agent()
        containers = [place.host.spawn_container() for _ in range(_CONTAINERS)]
        left = [_IDLE_ATTACHES]

        def enough() -> bool:
            left[0] -= 1
            return left[0] < 0

        idle = _attach_until(place, containers, enough)
        rounds = run.rounds or ROUNDS
        for number in range(1, rounds + 1):
            everyone = list(mesh.hosts.values())
            for change, samples in ((mesh.remove, leaving), (mesh.add, busy)):
                done = pool.submit(_change, place, change, everyone)
                samples.extend(_attach_until(place, containers, done.done))
                done.result()
                place.settle()
            run.say(f"round {number} of {rounds}: {len(busy)} attaches while hosts joined")
        wrong = place.differences()
    if wrong:
        raise RuntimeError(f"{len(wrong)} differences to the kernel: {wrong[:5]}")
    return [
        *_measures("attach, nothing else to do", idle, None),
        *_measures(f"attach while {hosts:,} hosts join", busy, at_most(_BOUND_MS)),
        *_measures(f"attach while {hosts:,} hosts leave", leaving, None),
    ]


def _change(place: Site, change: Callable[..., int], hosts: Sequence[object]) -> None:
    """Let all hosts leave or join, and wait until a pass of the agent has seen that through.

    Not until it is in sync: endpoints that come and go give it something to look at all the time.
    """
    change(hosts)
    peers = len(place.mesh.hosts)
    wait_until(lambda: place.status()["networks"][0]["peers"] == peers, SYNC_DEADLINE_S, "a pass")


def _attach_until(
    place: Site, containers: Sequence[LabContainer], done: Callable[[], bool]
) -> list[Attach]:
    found: list[Attach] = []
    while True:
        for container in containers:
            if done():
                return found
            target = {"pid": container.pid, "network": NAME}
            began = time.perf_counter()
            document = place.client.post("attach", body=target)
            request_ms = (time.perf_counter() - began) * 1000
            found.append(Attach(float(document["agent_ms"]), request_ms))
            place.client.post("detach", body=target)


def _measures(what: str, samples: Sequence[Attach], bound: Bound | None) -> list[Measure]:
    agent_ms = [sample.agent_ms for sample in samples]
    request_ms = [sample.request_ms for sample in samples]
    return [
        Measure(f"{what}, p50", percentile(agent_ms, 50), "ms", None, tuple(agent_ms)),
        Measure(f"{what}, p99", percentile(agent_ms, 99), "ms", bound),
        Measure("… whole request, p50", percentile(request_ms, 50), "ms", None, tuple(request_ms)),
        Measure("… whole request, p99", percentile(request_ms, 99), "ms"),
    ]
