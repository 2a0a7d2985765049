"""One agent while a mesh of 10,000 hosts changes 200 times a second, and one killed at its work.

After the changes the kernel must hold exactly what etcd says (`tests.bench.exact`): nothing is
missing, nothing is there twice, nothing is left.  So it must after an agent was killed when it had
written half of its neighbours, or half of its routes, and was started again.
``tests/netns/test_scale.py`` runs the same with fewer hosts.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from meshnet.kernel.events import RTNLGRP_IPV4_ROUTE, RTNLGRP_NEIGH
from tests.bench.changes import Changes
from tests.bench.common import Measure, at_most, percentile
from tests.bench.exact import count_objects
from tests.bench.notifications import Watch
from tests.bench.site import site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.bench.common import Run
    from tests.bench.site import Site

HOSTS, SECONDS, RATE = 10_000, 60.0, 200.0
_SEED = 1
_KILLS = 5
_SAMPLE_EVERY_S = 0.1
_DEADLINE_S, _SETTLE_DEADLINE_S = 60.0, 400.0
_GROUPS = {"neighbour": RTNLGRP_NEIGH, "route": RTNLGRP_IPV4_ROUTE}
"""Whose notifications are counted; FDB entries come in the group of neighbours, but after them."""


class Lag(NamedTuple):
    """How far behind the agent was at one moment.

    Attributes:
        revisions: that etcd was ahead of what ``status`` said.
        seconds: since the first change that the agent had not heard of.
        pending: what ``status`` said.
    """

    revisions: int
    seconds: float
    pending: int


class Churned(NamedTuple):
    """How it went.

    Attributes:
        rate: changes a second that were reached.
        cpu_s: the agent's, during the changes, which took `seconds`.
        delays_s: for each host that joined, from before its put to its route, where one came.
        settled_s: from the last change to in sync.
        differences: between kernel and store, then.
    """

    rate: float
    seconds: float
    cpu_s: float
    passes: int
    full_passes: int | None
    lags: list[Lag]
    delays_s: list[float]
    settled_s: float
    differences: list[str]


class Killed(NamedTuple):
    """How it went.

    Attributes:
        left: kernel objects that the killed agent left.
        wanted: that there should be.
        writes: of its successor.
        differences: between kernel and store after that.
    """

    left: int
    wanted: int
    writes: int
    differences: list[str]


def run(run: Run) -> list[Measure]:
    """See the module."""
    hosts = run.sizes[0] if run.sizes else HOSTS
    with site() as place:
        place.mesh.add(place.mesh.new_hosts(hosts))
        kills = {}
        for kind in ("neighbour", "route"):
            kills[kind] = kill_half_way(place, kind)
            run.say(f"killed after half of the {kind}s: {kills[kind].left:,} objects were there")
            place.host.stop_agent()
            place.empty_kernel()
        place.start_agent()
        run.say(f"{hosts:,} hosts are programmed; changes begin")
        churned = churn(place, run.seconds or SECONDS, RATE)
    for line in churned.differences[:10]:
        run.say(line)
    return [*_churn_measures(churned), *(m for k, r in kills.items() for m in _kill_measures(k, r))]


def churn(place: Site, seconds: float, rate: float) -> Churned:
    """Change hosts all the time; the agent is in sync at first."""
    changes = Changes(place.mesh, _SEED)
    before, cpu_s = place.status()["kernel"], place.cpu_s()
    began = time.monotonic()
    with place.watch() as watch, _listening(watch) as heard, _sampling(place, changes) as lags:
        reached = changes.run(seconds, rate)
        ended = time.monotonic()
        cpu_s = place.cpu_s() - cpu_s
        after = place.status()["kernel"]
        place.settle(_SETTLE_DEADLINE_S)
        settled_s = time.monotonic() - ended
    full = after["full_passes"] - before["full_passes"] if "full_passes" in after else None
    return Churned(
        rate=reached,
        seconds=ended - began,
        cpu_s=cpu_s,
        passes=after["passes"] - before["passes"],
        full_passes=full,
        lags=lags,
        delays_s=_delays(place, changes, heard),
        settled_s=settled_s,
        differences=place.differences(),
    )


def kill_half_way(place: Site, kind: str) -> Killed:
    """Kill an agent when half of its objects of a kind are in the kernel, and start it again.

    No agent runs at first, and the kernel is empty.  Half the routes take the kernel 20 ms: on a
    busy machine the kill may come when all is done, and then all is done again.

    Args:
        kind: ``neighbour``, the first to be written, or ``route``, the last.

    Raises:
        TimeoutError: the agent was always faster.
    """
    mesh = place.mesh
    wanted = len(mesh.objects(mesh.hosts.values())) + 1 + mesh.dual_stack
    for _ in range(_KILLS):
        _kill(place, kind)
        left = count_objects(place.host)
        if left < wanted:
            document, _ = place.start_agent()
            return Killed(left, wanted, document["kernel"]["writes"], place.differences())
        place.empty_kernel()
    raise TimeoutError(f"the agent wrote all {kind}s before it was killed, {_KILLS} times")


def _kill(place: Site, kind: str) -> None:
    netns = {place.host.name: place.host.netns_path}
    with Watch(netns, [_GROUPS[kind]]) as watch:
        place.host.start_agent(["--log-format", "json"], wait=False)
        pid = place.host.agent_pid
        watch.count(len(place.mesh.hosts) // 2, _DEADLINE_S)
        os.kill(pid, signal.SIGKILL)  # at once; it is our child, so the pid is its own
    place.host.kill_agent()  # reaps it


@contextlib.contextmanager
def _listening(watch: Watch) -> Iterator[dict[bytes, list[float]]]:
    """By prefix, the moments at which its route came (or was changed), while the block runs."""
    heard: dict[bytes, list[float]] = {}

    def listen(done: threading.Event) -> None:
        while not done.is_set():
            for notification in watch.read(_SAMPLE_EVERY_S):
                if notification.there and notification.object.kind == "route":
                    heard.setdefault(notification.object.key, []).append(notification.at)

    with _thread(listen):
        yield heard


@contextlib.contextmanager
def _sampling(place: Site, changes: Changes) -> Iterator[list[Lag]]:
    """How far behind the agent is, again and again, while the block runs."""
    lags: list[Lag] = []

    def sample(done: threading.Event) -> None:
        while not done.wait(_SAMPLE_EVERY_S):
            written = len(changes.written)
            document = place.status()
            now, known = time.monotonic(), document["store"]["revision"]
            unheard = bisect.bisect_right(changes.written, known, 0, written, key=lambda w: w[1])
            if unheard == written:
                revisions, seconds = 0, 0.0
            else:
                revisions = changes.written[written - 1][1] - known
                seconds = now - changes.written[unheard][0]
            lags.append(Lag(revisions, seconds, max(n["pending"] for n in document["networks"])))

    with _thread(sample):
        yield lags


@contextlib.contextmanager
def _thread(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` in a thread until the block ends; what it raises is raised there."""
    done = threading.Event()
    errors: list[Exception] = []

    def guarded() -> None:
        try:
            work(done)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if errors:
        raise errors[0]


def _delays(place: Site, changes: Changes, heard: dict[bytes, list[float]]) -> list[float]:
    found = []
    for join in changes.joins:
        moments = heard.get(place.mesh.addressing(join.host)[0].subnet.network_address.packed, [])
        at = next((moment for moment in moments if moment >= join.at), None)
        # None: it left again before the agent came to it.
        if at is not None:
            found.append(at - join.at)
    return found


def _churn_measures(churned: Churned) -> list[Measure]:
    lags = churned.lags
    seconds, revisions = [lag.seconds for lag in lags], [float(lag.revisions) for lag in lags]
    delays_ms = [delay * 1000 for delay in churned.delays_s]
    found = [
        Measure("changes a second", churned.rate, ""),
        Measure("CPU of the agent", churned.cpu_s / churned.seconds * 100, "%"),
        Measure("passes a second", churned.passes / churned.seconds, ""),
        Measure("join to route, p50", percentile(delays_ms, 50), "ms"),
        Measure("join to route, p99", percentile(delays_ms, 99), "ms"),
        Measure("store not heard for, p50", percentile(seconds, 50), "s"),
        Measure("store not heard for, most", max(seconds), "s"),
        Measure("revisions behind, most", max(revisions), ""),
        Measure("most pending", max(lag.pending for lag in lags), ""),
        Measure("last change to in sync", churned.settled_s, "s"),
        Measure("kernel against store, differences", len(churned.differences), "", at_most(0)),
    ]
    if churned.full_passes is not None:
        found.insert(3, Measure("full passes", churned.full_passes, ""))
    return found


def _kill_measures(kind: str, killed: Killed) -> list[Measure]:
    name = f"killed at half of the {kind}s"
    return [
        Measure(f"{name}, objects left", killed.left / killed.wanted * 100, "%"),
        Measure(f"{name}, writes of the next", killed.writes, ""),
        Measure(f"{name}, differences then", len(killed.differences), "", at_most(0)),
    ]
