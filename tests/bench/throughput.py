"""TCP throughput and ping round trip between containers on two hosts.

Six paths, measured in turn, one flow at a time::

    vxlan       container ─ meshnet's VXLAN ─ container            against  handmade
    handmade    container ─ VXLAN made with ip(8) ─ container
    masquerade  the same, with one nftables rule for the outside (conntrack)
    direct      container ─ meshnet's direct routing ─ container   against  underlay
    routed      container ─ plain routes made with ip(8) ─ container, no nftables
    underlay    host ─ host, no overlay and no nftables

Two ways of looking, because on a machine with few CPUs a flow's throughput jumps by a factor of two
with where the scheduler puts its ends:

    TCP       both ends wherever the scheduler puts them, Gb/s
    TCP/CPU   both ends on one CPU, Gb/s by the share of it that they used: what a byte costs.
              Another program on that CPU makes the flow slower, but hardly changes this.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tests.bench.common import at_least, median_of, median_ratio, scratch
from tests.bench.handmade import Handmade
from tests.bench.ways import Way, lab_ways, two_hosts

if TYPE_CHECKING:
    from meshnet.lab.topology import Lab
    from tests.bench.common import Measure, Run

ROUNDS = 5
_FLOW_S, _PINNED_FLOW_S = 2, 1
_PINNED_FLOWS = 2  # a round
_WAYS = ("vxlan", "handmade", "masquerade", "direct", "routed", "underlay")


def run(run: Run) -> list[Measure]:
    """See the module."""
    cpu = str(max(os.sched_getaffinity(0)))
    gbps: dict[str, list[float]] = {name: [] for name in _WAYS}
    per_cpu: dict[str, list[float]] = {name: [] for name in _WAYS}
    ping_us: dict[str, list[float]] = {name: [] for name in _WAYS}
    with scratch() as spaces, two_hosts() as lab:
        run.say("building a lab of two hosts, and two hosts by hand")
        lab.up()
        handmade = Handmade(spaces)
        ways = _build_ways(lab, handmade)
        rounds = run.rounds or ROUNDS
        for number in range(1, rounds + 1):
            # Each round begins with another path, as every measurement affects the next one.
            for name in _WAYS[number % len(_WAYS) :] + _WAYS[: number % len(_WAYS)]:
                handmade.masquerade(name == "masquerade")
                way = ways[name]
                ping_us[name].append(way.ping_us())
                for _ in range(_PINNED_FLOWS):
                    flow = way.send(_PINNED_FLOW_S, "-A", f"{cpu},{cpu}")
                    per_cpu[name].append(flow.gbps / flow.cpus)
                gbps[name].append(way.send(_FLOW_S).gbps)
            values = ", ".join(f"{n} {gbps[n][-1]:.1f} ({per_cpu[n][-1]:.1f})" for n in _WAYS)
            run.say(f"round {number} of {rounds}: {values} Gb/s (by CPU)")
    return [
        *_compare("TCP", gbps, "Gb/s"),
        *_compare("TCP/CPU", per_cpu, "Gb/s"),
        *(median_of(f"ping {name}", ping_us[name], "µs") for name in _WAYS),
        median_ratio("ping vxlan / handmade", ping_us["vxlan"], ping_us["handmade"]),
        median_ratio("ping vxlan / masquerade", ping_us["vxlan"], ping_us["masquerade"]),
    ]


def _compare(what: str, values: dict[str, list[float]], unit: str) -> list[Measure]:
    def ratio(ours: str, peer: str, bound: float | None) -> Measure:
        limit = at_least(bound) if bound is not None else None
        return median_ratio(f"{what} {ours} / {peer}", values[ours], values[peer], limit)

    return [
        *(median_of(f"{what} {name}", values[name], unit) for name in _WAYS),
        ratio("vxlan", "handmade", 0.97),
        ratio("vxlan", "masquerade", None),
        ratio("direct", "underlay", 0.9),
        ratio("direct", "routed", None),
    ]


def _build_ways(lab: Lab, handmade: Handmade) -> dict[str, Way]:
    """The ways by name, each with a server that listens."""
    made = Way(handmade.container(1), handmade.container(2), handmade.container_ip(2))
    ways = {
        "vxlan": lab_ways(lab, "tunnel", "10.42.0.0/16")[0],
        "handmade": made,
        "direct": lab_ways(lab, "direct", "10.44.0.0/16", "--direct-routing")[0],
        "routed": Way(handmade.container(1), handmade.container(2), handmade.routed_ip(2)),
        "underlay": Way(handmade.host(1), handmade.host(2), handmade.host_ip(2)),
    }
    for name, way in ways.items():
        if name != "routed":  # its server serves the overlay address, too
            way.start_server()
        way.client.run(["ping", "-n", "-c", "1", "-W", "2", way.address])
    return ways | {"masquerade": made}
