"""One real agent in a mesh of 1,000, 10,000 and 30,000 hosts, from its process's start on.

The other hosts are simulated: their keys are in a real etcd, nobody runs them.  Measured are the
start by stages, a pass with nothing to do, hosts that join and leave, memory and CPU; beside it the
same number of hosts programmed by ip(8) and bridge(8), in the same run.  When objects appear is
what the kernel tells of itself (`tests.bench.notifications`); delays begin before the put.
"""

from __future__ import annotations

import statistics
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from meshnet.lab.poll import wait_until
from tests.bench.classic import program_by_hand
from tests.bench.common import Measure, at_most, median_of, median_ratio
from tests.bench.site import site
from tests.bench.start import STAGES, measure_start

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.bench.common import Bound, Run
    from tests.bench.notifications import Watch
    from tests.bench.site import Document, Site
    from tests.bench.start import Start

SIZES = (1_000, 10_000, 30_000)
_ROUNDS, _ROUNDS_ABOVE_10_000 = 3, 1
_JOINS, _JOINS_S = (5, 20), 30.0
_CROWD, _PASSES = 500, 3
_DEADLINE_S = 60.0

# Bounds that the design gives for one size.
_RATIO = {10_000: at_most(0.25)}
_PROGRAMMING = {30_000: at_most(1.5)}
_PASS_CPU = {10_000: at_most(0.5)}
_MEMORY = {10_000: at_most(120)}


class Joins(NamedTuple):
    """Delays in seconds, from the put to the last kernel object.

    Attributes:
        crowd: the first of many puts to the last object of the last host.
        crowd_pending: the largest ``pending`` that status showed meanwhile.
    """

    joins: list[float]
    leaves: list[float]
    crowd: float
    crowd_pending: int


class IdlePass(NamedTuple):
    """A pass that finds everything in place."""

    cpu_s: float
    writes: int


def run(run: Run) -> list[Measure]:
    """See the module."""
    measures: list[Measure] = []
    starts: dict[int, list[Start]] = {}
    for count in run.sizes or SIZES:
        measures += _measure(run, count, starts)
    least, most = min(starts), max(starts)
    if least != most:
        measures.append(
            Measure(
                f"passes, time a host, {most:,} / {least:,}",
                _pass_s(starts[most]) / most * least / _pass_s(starts[least]),
                "×",
                at_most(1.5),
            )
        )
    return measures


def _measure(run: Run, count: int, starts: dict[int, list[Start]]) -> list[Measure]:
    rounds = run.rounds or (_ROUNDS if count <= 10_000 else _ROUNDS_ABOVE_10_000)
    starts[count] = []
    peer: list[float] = []
    with site() as place:
        began = time.monotonic()
        place.mesh.add(place.mesh.new_hosts(count))
        run.say(f"{count:,} hosts are in etcd after {time.monotonic() - began:.1f} s")
        for number in range(1, rounds + 1):
            if number > 1:
                place.host.stop_agent()
                place.empty_kernel()
            starts[count].append(measure_start(place))
            peer.append(program_by_hand(count))
            run.say(
                f"round {number} of {rounds}: {count:,} hosts in sync "
                f"{starts[count][-1].seconds:.2f} s after the start; by hand {peer[-1]:.2f} s"
            )
        idle = measure_idle_passes(place)
        joins = _measure_joins(place)
        wrong = place.differences()
    if wrong:
        raise RuntimeError(f"{len(wrong)} differences to the kernel: {wrong[:5]}")
    return [*_start_measures(count, starts[count], peer), *_running_measures(count, idle, joins)]


def measure_idle_passes(place: Site) -> list[IdlePass]:
    """Let the agent look at everything, with nothing to do."""
    found = []
    for _ in range(_PASSES):
        document = place.settle()
        before, passes, cpu_s = document["kernel"], _passes(document), place.cpu_s()
        place.provoke_pass()
        wait_until(_passed(place, passes), _DEADLINE_S, "a pass")
        after = place.settle()["kernel"]
        count = after["passes"] - before["passes"]
        found.append(IdlePass((place.cpu_s() - cpu_s) / count, after["writes"] - before["writes"]))
    return found


def _passes(document: Document) -> int:
    """Full passes, by an agent that tells them from others."""
    kernel = document["kernel"]
    return int(kernel.get("full_passes", kernel["passes"]))


def _passed(place: Site, passes: int) -> Callable[[], bool]:
    return lambda: _passes(place.status()) > passes


def _measure_joins(place: Site) -> Joins:
    mesh = place.mesh
    joins: list[float] = []
    leaves: list[float] = []
    least, most = _JOINS
    enough = time.monotonic() + _JOINS_S
    with place.watch() as watch:
        while len(joins) < least or (len(joins) < most and time.monotonic() < enough):
            host = mesh.new_hosts(1)
            objects = mesh.objects(host)
            began = time.monotonic()
            mesh.add(host)
            joins.append(watch.until_all(objects, True, _DEADLINE_S) - began)
            place.settle()
            began = time.monotonic()
            mesh.remove(host)
            leaves.append(watch.until_all(objects, False, _DEADLINE_S) - began)
            place.settle()
        crowd, pending = _measure_crowd(place, watch)
    return Joins(joins, leaves, crowd, pending)


def _measure_crowd(place: Site, watch: Watch) -> tuple[float, int]:
    mesh = place.mesh
    hosts = mesh.new_hosts(_CROWD)
    done = threading.Event()
    pending = [0]

    def look() -> None:
        while not done.wait(0.005):
            pending.append(max(n["pending"] for n in place.status()["networks"]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        began = time.monotonic()
        mesh.add(hosts)
        crowd_s = watch.until_all(mesh.objects(hosts), True, _DEADLINE_S) - began
    finally:
        done.set()
        thread.join()
    place.settle()
    return crowd_s, max(pending)


def _start_measures(count: int, starts: Sequence[Start], peer: Sequence[float]) -> list[Measure]:
    def median(
        what: str, values: Sequence[float], unit: str, bound: Bound | None = None
    ) -> Measure:
        return median_of(f"{count:,}: {what}", values, unit, bound)

    found = [median("start to in sync", [s.seconds for s in starts], "s")]
    for stage in STAGES:
        found.append(median(f"… {stage}", [s.stages[stage] for s in starts], "s"))
    passes = [s.pass_s for s in starts]
    applying = [s.stages["apply"] for s in starts]
    return [
        *found,
        median("decoding alone", [s.decode_s for s in starts], "s"),
        median("passes that wrote", passes, "s", _PROGRAMMING.get(count)),
        median("by ip and bridge -batch", peer, "s"),
        median_ratio(f"{count:,}: passes / by hand", passes, peer, _RATIO.get(count)),
        median_ratio(f"{count:,}: apply alone / by hand", applying, peer),
        median("CPU of the start", [s.cpu_s for s in starts], "s"),
        median("memory, RSS", [s.rss_mib for s in starts], "MiB", _MEMORY.get(count)),
        median("memory, peak", [s.peak_mib for s in starts], "MiB"),
    ]


def _running_measures(count: int, idle: Sequence[IdlePass], joins: Joins) -> list[Measure]:
    cpu = [i.cpu_s for i in idle]
    joins_ms, leaves_ms = ([s * 1000 for s in values] for values in (joins.joins, joins.leaves))
    writes = [float(i.writes) for i in idle]
    return [
        median_of(f"{count:,}: idle pass, CPU", cpu, "s", _PASS_CPU.get(count)),
        Measure(f"{count:,}: idle passes, writes", sum(writes), "", at_most(0), tuple(writes)),
        median_of(f"{count:,}: one host joins, median", joins_ms, "ms"),
        Measure(f"{count:,}: one host joins, most", max(joins_ms), "ms"),
        median_of(f"{count:,}: one host leaves, median", leaves_ms, "ms"),
        Measure(f"{count:,}: one host leaves, most", max(leaves_ms), "ms"),
        Measure(f"{count:,}: {_CROWD} hosts join at once", joins.crowd * 1000, "ms"),
        Measure(f"{count:,}: … most pending", joins.crowd_pending, ""),
    ]


def _pass_s(starts: Sequence[Start]) -> float:
    return statistics.median(s.pass_s for s in starts)
