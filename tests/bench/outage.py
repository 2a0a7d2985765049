"""Starts of an agent while etcd is silent, from its disk; and what that file costs.

The other hosts are simulated, as in `tests.bench.scale`.  A start begins with an empty kernel, and
etcd is frozen: it takes connections and never answers.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from meshnet.lab.poll import wait_until
from meshnet.store.saved import decode_saved, encode_saved
from tests.bench.common import Measure, at_most
from tests.bench.site import site

if TYPE_CHECKING:
    from tests.bench.common import Bound, Run
    from tests.bench.site import Site

SIZES = (3, 1_000, 10_000)
_ROUNDS = 5
_BOUNDS = {1_000: at_most(2.0)}
_SAVED_S = 60.0


def run(run: Run) -> list[Measure]:
    """See the module."""
    measures: list[Measure] = []
    for count in run.sizes or SIZES:
        with site() as place:
            place.mesh.add(place.mesh.new_hosts(count))
            place.start_agent()
            _wait_saved(place)
            starts = []
            for number in range(1, (run.rounds or _ROUNDS) + 1):
                starts.append(_start_in_silence(place, count))
                run.say(f"start {number}, {count:,} hosts: {starts[-1]:.2f} s")
            measures += [_measure_start(count, starts, _BOUNDS.get(count)), *_measure_file(place)]
    return measures


def _measure_start(count: int, starts: list[float], bound: Bound | None) -> Measure:
    name = f"{count:,}: process start to in sync"
    return Measure(name, statistics.median(starts), "s", bound, tuple(starts))


def _start_in_silence(place: Site, count: int) -> float:
    place.host.stop_agent()
    place.empty_kernel()
    place.lab.etcd.pause()
    try:
        _, seconds = place.start_agent()
        wrong = place.differences()
    finally:
        place.lab.etcd.resume()
    if wrong:
        raise RuntimeError(f"{len(wrong)} differences to the kernel: {wrong[:5]}")
    wait_until(lambda: place.status()["store"]["connected"], 60, "etcd is followed again")
    return seconds


def _wait_saved(place: Site) -> None:
    file = place.host.state_dir / "snapshot.json"

    def has_all() -> bool:
        if not file.exists():
            return False
        hosts = decode_saved(file.read_bytes()).mirror.view().hosts
        return len(hosts) > len(place.mesh.hosts)

    wait_until(has_all, _SAVED_S, "the mesh is on disk")


def _measure_file(place: Site) -> list[Measure]:
    raw = (place.host.state_dir / "snapshot.json").read_bytes()
    count = len(place.mesh.hosts)
    began = time.perf_counter()
    saved = decode_saved(raw)
    decoded = time.perf_counter()
    state = saved.mirror.state()
    copied = time.perf_counter()
    encode_saved(state, mesh=saved.mesh, host=saved.host, now_s=0)
    encoded = time.perf_counter()
    return [
        Measure(f"{count:,}: file", len(raw) / 1024, "KiB"),
        Measure(f"{count:,}: read and checked", (decoded - began) * 1000, "ms"),
        Measure(f"{count:,}: copied, on the event loop", (copied - decoded) * 1000, "ms"),
        Measure(f"{count:,}: encoded, in a thread", (encoded - copied) * 1000, "ms"),
    ]
